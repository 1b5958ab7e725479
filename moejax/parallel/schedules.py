"""Pipeline schedules as tables: `ticks[tick][stage]` is what a stage does in a tick.  No jax here.

In one tick a stage does at most one F (forward of a microbatch through a chunk of layers), one B (the gradient of the
chunk's input) and one W (the gradient of its weights), in this order; where a schedule has no W, B makes both.
All stages end a tick together, and what F and B made arrives at the neighbour before the next tick.  With several
chunks, chunk c of stage s is part c × stages + s of the model.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple

from moejax.config import Config, ConfigError

OP = re.compile(r"([FBW])([0-9]+)(?:\.([0-9]+))?")  # as Op is written
COLOURS = {"F": "#4f7df0", "B": "#0e9f8e", "W": "#e8a33d"}


class Op(NamedTuple):
    kind: str  # F, B or W
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + f".{self.chunk}" * (self.chunk > 0)


Ticks = tuple[tuple[tuple[Op, ...], ...], ...]


@dataclass(frozen=True)
class Schedule:
    name: str
    stages: int
    microbatches: int
    chunks: int
    ticks: Ticks

    @cached_property
    def at(self) -> dict[tuple[str, int, int], int]:
        """(kind, microbatch, part of the model) -> tick, of the first time it is done."""
        return {(op.kind, op.microbatch, op.chunk * self.stages + s): tick for tick, s, op in reversed(self.ops())}

    @cached_property
    def split(self) -> bool:
        """Weight gradients are ops of their own."""
        return any(op.kind == "W" for _, _, op in self.ops())

    def ops(self) -> list[tuple[int, int, Op]]:
        """(tick, stage, op) of all."""
        return [(tick, s, op) for tick, row in enumerate(self.ticks) for s, cell in enumerate(row) for op in cell]

    def check(self) -> list[str]:
        """Everything that makes the table incomplete or impossible, each with its tick and stage."""
        kinds, last = "FBW" if self.split else "FB", self.stages * self.chunks - 1
        problems, done = [f"tick {tick} has {len(row)} stages; the schedule has {self.stages}"
                          for tick, row in enumerate(self.ticks) if len(row) != self.stages], set()
        for tick, stage, op in self.ops():
            where, part = f"tick {tick}, stage {stage}: {op}", op.chunk * self.stages + stage
            if op.kind not in kinds or not (0 <= op.microbatch < self.microbatches and 0 <= op.chunk < self.chunks):
                problems.append(f"{where} is none of the ops {', '.join(kinds)} of {self.microbatches} microbatches "
                                f"and {self.chunks} chunks")
                continue
            if (op.kind, op.microbatch, part) in done:
                problems.append(f"{where} was done before, in tick {self.at[op.kind, op.microbatch, part]}")
            done.add((op.kind, op.microbatch, part))
            if [other.kind for other in self.ticks[tick][stage]].count(op.kind) > 1:
                problems.append(f"{where} is not the only {op.kind} there; a stage does one of a kind in a tick")
            for kind, other, wait in self.needs(op, part, last):
                ready = self.at.get((kind, op.microbatch, other))
                if ready is None:
                    problems.append(f"{where} waits for ever for {kind}{op.microbatch} of part {other}: nobody does it")
                elif ready + wait > tick:
                    arrives = f"arrives for tick {ready + wait}" if wait else f"is done in tick {ready}"
                    problems.append(f"{where} uses {kind}{op.microbatch} of part {other} (stage {other % self.stages}) "
                                    f"before it is there: it {arrives}")
        for kind, part in product(kinds, range(last + 1)):
            if missing := [str(m) for m in range(self.microbatches) if (kind, m, part) not in done]:
                problems.append(f"stage {part % self.stages} never does {kind} of chunk {part // self.stages} for "
                                f"microbatches {', '.join(missing)}")
        return problems

    def needs(self, op: Op, part: int, last: int) -> list[tuple[str, int, int]]:
        """(kind, part, ticks until it can be used) of what an op waits for."""
        if op.kind == "F":
            return [("F", part - 1, 1)] if part else []
        if op.kind == "W":
            return [("B", part, 0)]
        return [("F", part, 0)] + ([("B", part + 1, 1)] if part < last else [])

    def lengths(self, costs: dict[str, float] | None = None) -> list[float]:
        """How long each tick takes: as long as its busiest stage."""
        return [max(self.work(cell, costs) for cell in row) for row in self.ticks]

    def work(self, cell: Sequence[Op], costs: dict[str, float] | None = None) -> float:
        costs = costs or dict.fromkeys("FBW", 1.0)
        both = 0.0 if self.split else costs["W"]  # B makes both gradients
        return sum(costs[op.kind] + both * (op.kind == "B") for op in cell)

    def bubble(self, costs: dict[str, float] | None = None) -> float:
        """Idle share of the stages' time, counted from the table.  Costs are of one F, B and W, by default all 1."""
        busy = sum(self.work(cell, costs) for row in self.ticks for cell in row)
        return 1 - busy / (self.stages * sum(self.lengths(costs)))

    def peak_inflight(self) -> list[int]:
        """Of every stage, the most (microbatch, chunk) that it holds at once: from F until the last use."""
        spans: list[list[tuple[int, int]]] = [[] for _ in range(self.stages)]
        for kind, m, part in self.at:
            if kind == "F":
                spans[part % self.stages].append((self.at["F", m, part], self.at["W" if self.split else "B", m, part]))
        return [max(sum(begin <= tick <= end for begin, end in mine) for tick, _ in mine) for mine in spans]

    def show(self, width: int = 160) -> str:
        """The table as text: a line per stage, a column per tick; the middle is left out beyond `width` characters."""
        cells = [["".join(map(str, row[stage])) or "·" for row in self.ticks] for stage in range(self.stages)]
        wide = max(len(cell) for row in cells for cell in row)
        fits = max(3, (width - 10) // (wide + 1))
        shown = list(range(len(self.ticks)))
        if len(shown) > fits:
            shown = [*shown[: fits // 2], -1, *shown[-(fits - fits // 2 - 1):]]
        lines = [f"stage {stage:<3} " + " ".join("…".ljust(wide) if t < 0 else row[t].ljust(wide) for t in shown)
                 for stage, row in enumerate(cells)]
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def svg(self, costs: dict[str, float] | None = None) -> str:
        """The table as a Gantt picture: time runs to the right, a row per stage."""
        *begins, total = accumulate(self.lengths(costs), initial=0.0)
        scale, height, left = min(24.0, 1600 / max(total, 1)), 26, 58
        parts = [f'<text x="0" y="{stage * height + 15}" class="stage">stage {stage}</text>'
                 for stage in range(self.stages)]
        for tick, stage, op in self.ops():
            cell = self.ticks[tick][stage]
            x, y = left + (begins[tick] + self.work(cell[:cell.index(op)], costs)) * scale, stage * height
            wide = self.work([op], costs) * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(wide - 1, 0.5):.1f}" height="{height - 4}" rx="2" '
                f'fill="{COLOURS[op.kind]}" fill-opacity="{1 - 0.45 * op.chunk / max(self.chunks, 1):.2f}">'
                f'<title>tick {tick}, stage {stage}: {op}</title></rect>')
            if wide >= 14:
                parts.append(f'<text x="{x + wide / 2:.1f}" y="{y + 15}" class="op">{op.microbatch}</text>')
        wide = left + total * scale
        return (f'<svg viewBox="0 0 {wide:.0f} {self.stages * height}" xmlns="http://www.w3.org/2000/svg" '
                f'style="max-width:{wide:.0f}px;width:100%;font:11px sans-serif"><style>'
                f'.stage{{fill:currentColor}}.op{{fill:#fff;text-anchor:middle}}</style>{"".join(parts)}</svg>')


def table(stages: int, microbatches: int, chunks: int, wait: int | None) -> Ticks:
    """Each F a tick after that of the part before, in groups of `stages` microbatches, chunk after chunk; each B a tick
    after that of the part behind, `wait` ticks later than could be (None: there are no B).
    """
    ops, parts = defaultdict(tuple), stages * chunks
    for kind, m, part in product("F" if wait is None else "FB", range(microbatches), range(parts)):
        first = m // stages * parts + m % stages
        tick = first + part if kind == "F" else first + 2 * (parts - 1) - part + wait
        ops[tick, part % stages] += (Op(kind, m, part // stages),)
    return tuple(tuple(ops[tick, s] for s in range(stages)) for tick in range(max(ops)[0] + 1))


def gpipe(stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    return Schedule("gpipe", stages, microbatches, 1, table(stages, microbatches, 1, microbatches))


def interleaved(stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Every stage holds several chunks, and a microbatch passes all stages once for each (arXiv 2104.04473)."""
    return Schedule("interleaved", stages, microbatches, chunks, table(stages, microbatches, chunks, 0))


def one_f_one_b(stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """One backward for each forward (PipeDream-flush, arXiv 2006.09503): memory is flat in microbatches."""
    return Schedule("1f1b", stages, microbatches, 1, table(stages, microbatches, 1, 0))


def zero_bubble(stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Weight gradients fill the gaps of 1f1b (ZB-H1, arXiv 2401.10241).

    A stage that would only wait for a neighbour does a weight gradient that it still owes; all do one where all owe
    one.  After the last forward every tick of a backward is followed by one of weight gradients alone.
    """
    plain = one_f_one_b(stages, microbatches).ticks
    waiting: list[list[int]] = [[] for _ in range(stages)]
    rows: list[tuple[tuple[Op, ...], ...]] = []

    def add(row: Sequence[tuple[Op, ...]], length: int) -> None:
        """The row, and a weight gradient wherever a stage has time and owes one."""
        cells = []
        for s, cell in enumerate(row):
            waiting[s] += [op.microbatch for op in cell if op.kind == "B"]
            fill = waiting[s] and len(cell) < length
            cells.append((*cell, Op("W", waiting[s].pop(0))) if fill else cell)
        rows.append(tuple(cells))

    for tick, row in enumerate(plain):
        busiest = max(len(cell) for cell in row)
        more = all((owed or any(op.kind == "B" for op in cell)) and len(cell) == busiest
                   for owed, cell in zip(waiting, row, strict=True))
        add(row, busiest + more)
        if tick > stages + microbatches - 2 and any(waiting):  # after the last F
            add([()] * stages, 1)
    while any(waiting):
        add([()] * stages, 1)
    return Schedule("zero_bubble", stages, microbatches, 1, tuple(rows))


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "1f1b": one_f_one_b, "gpipe": gpipe, "interleaved": interleaved, "zero_bubble": zero_bubble}


def forwards(stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Only the forwards, as in evaluation."""
    return Schedule("forwards", stages, microbatches, chunks, table(stages, microbatches, chunks, None))


def without_idle(schedule: Schedule) -> Schedule:
    """The same ops of every stage with no waiting: nothing that could be trained with, but what its time is made of."""
    mine = [[[op for tick, s, op in schedule.ops() if s == stage and op.kind == kind] for kind in "FBW"]
            for stage in range(schedule.stages)]
    rows = tuple(tuple(tuple(ops[tick] for ops in lists if ops) for lists in mine)
                 for tick in range(schedule.microbatches * schedule.chunks))
    return replace(schedule, name=f"{schedule.name} without idle", ticks=rows)


def describe(schedule: Schedule) -> str:
    """A schedule in a line."""
    chunks = f" of {schedule.chunks} chunks" * (schedule.chunks > 1)
    return (f"{schedule.name}: {schedule.stages} stages{chunks}, {schedule.microbatches} microbatches, "
            f"{len(schedule.ticks)} ticks; bubble {schedule.bubble():.1%} if F, B and W take equally long; "
            f"at most {max(schedule.peak_inflight())} microbatches are held by a stage at once")


def read_csv(path: Path, stages: int, microbatches: int, chunks: int) -> Schedule:
    """A line per tick, a column per stage, ops as in "F3 B1" (chunk 1: "F3.1").  Raises ConfigError on other files."""
    try:
        lines = [line for line in csv.reader(path.read_text().splitlines()) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"mesh.schedule names a schedule ({', '.join(SCHEDULES)}) or a CSV file; {path} cannot be "
                           f"read ({error})"]) from None
    if lines and all(cell.strip().lower().startswith("stage") for cell in lines[0]):
        del lines[0]
    problems = [f"{path}: tick {tick}, stage {stage}: an op is F, B or W and a microbatch, such as F3 or F3.1 of chunk "
                f"1; got {word!r}" for tick, line in enumerate(lines) for stage, text in enumerate(line)
                for word in text.split() if not OP.fullmatch(word)]
    if problems or not lines:
        raise ConfigError(problems or [f"{path} holds no tick"])
    rows = tuple(tuple(tuple(sorted((Op(kind, int(m), int(chunk or 0)) for kind, m, chunk in OP.findall(text)),
                                    key=lambda op: "FBW".index(op.kind))) for text in line) for line in lines)
    return Schedule(path.name, stages, microbatches, chunks, rows)


def make(config: Config) -> Schedule:
    """Of a config's pipeline.  Raises ConfigError: its CSV table cannot be read, is incomplete or impossible."""
    mesh, microbatches = config.mesh, config.train.microbatches
    if mesh.schedule in SCHEDULES:
        return SCHEDULES[mesh.schedule](mesh.pipeline, microbatches, mesh.chunks)
    found = read_csv(Path(mesh.schedule), mesh.pipeline, microbatches, mesh.chunks)
    if problems := found.check():
        raise ConfigError([f"{mesh.schedule}: {problem}" for problem in problems])
    return found

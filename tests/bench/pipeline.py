"""What the pipeline costs: bubbles, memory, FLOPs, time of idle ticks and of compilation, on fake CPU devices.

`pipeline.py [PART …]` with the parts of PARTS; all by default, each in a process of its own.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from moejax.config import load_config
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import schedules
from moejax.parallel.mesh import make_mesh
from moejax.parallel.pipeline import phases
from moejax.train.step import make_gradients

PLAIN = "1f1b"


def build(stages: int, microbatches: int, schedule=PLAIN, remat="full", *overrides: str, given=None, rows=2):
    """The lowered gradients of the config on a pipeline, and what they were made of."""
    config = load_config("configs/pipeline.py", [
        f"mesh.pipeline={stages}", f"train.microbatches={microbatches}", f"mesh.schedule={schedule}", "mesh.data=1",
        f"train.remat={remat}", "mesh.tensor=1", "mesh.fake_devices=0", f"data.batch={rows * microbatches}",
        *overrides])
    sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[: config.mesh.devices()]))
    shape = (config.data.batch, config.data.sequence)
    random = np.random.default_rng(0)
    batch = on_mesh(sharded.mesh, Batch(
        random.integers(0, config.model.vocab, shape, dtype=np.int32), random.integers(0, config.model.vocab, shape,
        dtype=np.int32), np.ones(shape, np.float32), np.arange(shape[0], dtype=np.int32)))
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded.shardings[name])
               for name, shape in sharded.shapes.items()}
    function = jax.jit(make_gradients(sharded, given))
    return function, (weights, batch, jax.random.key(0)), sharded


def bubbles() -> dict:
    """Counted from the tables, and the closed forms."""
    found = {}
    for stages, microbatches, chunks in ((4, 8, 2), (8, 32, 2), (15, 60, 4)):
        for name, make in schedules.SCHEDULES.items():
            v = chunks if name == "interleaved" else 1
            table = make(stages, microbatches, v)
            closed = (stages - 1) / (v * microbatches + stages - 1)
            found[f"{name}, {stages} stages × {v}, {microbatches} microbatches"] = [
                round(table.bubble(), 4), round(closed / 2 if name == "zero_bubble" else closed, 4)]
    return {"bubble counted, and its closed form (zero_bubble: half of 1f1b's, an upper bound)": found}


def memory() -> dict:
    """Temporary bytes of a device: flat in the number of microbatches, or not."""
    found = {}
    for name, remat in (("1f1b", "full"), ("1f1b", "none"), ("gpipe", "full"), ("zero_bubble", "full")):
        sizes = []
        for microbatches in (8, 64):
            function, args, _ = build(4, microbatches, name, remat)
            sizes.append(function.lower(*args).compile().memory_analysis().temp_size_in_bytes)
        found[f"{name}, remat {remat}"] = {"64 / 8 microbatches" + " (at most 1.05)" * (name == "1f1b"): round(
            sizes[1] / sizes[0], 3), "MiB": [round(size / 2**20, 2) for size in sizes]}
    return {"temporary memory at 4 stages": found}


def compile_time() -> dict:
    """16 stages against 4, in turn."""
    taken: dict[int, list[float]] = {4: [], 16: []}
    for _ in range(4):
        for stages in taken:
            function, args, _ = build(stages, 16, PLAIN, "full", "model.layers=16")
            jax.clear_caches()
            begin = time.perf_counter()
            function.lower(*args).compile()
            taken[stages].append(time.perf_counter() - begin)
    median = {stages: float(np.median(times[1:])) for stages, times in taken.items()}
    return {"compile time": {"16 stages / 4 stages (at most 2)": round(median[16] / median[4], 2),
                             "seconds": {str(k): round(v, 2) for k, v in median.items()}}}


def large() -> dict:
    """Tensor 8 × pipeline 15 compiles."""
    begin = time.perf_counter()
    function, args, _ = build(15, 30, PLAIN, "full", "mesh.tensor=8", "model.layers=30", "model.heads=8")
    function.lower(*args).compile()
    return {"120 fake devices, tensor 8 × pipeline 15, compile s": round(time.perf_counter() - begin, 1)}


def idle() -> dict:
    """Seconds of a step against the same ops without the idle ticks.  All stages share the cores here, so that the
    ratio is 1 if idle ticks cost nothing, and ticks / busy ticks if they did the work of the others.
    """
    cases, found = {}, {}
    for name in schedules.SCHEDULES:
        if name == "interleaved":
            continue
        table = schedules.SCHEDULES[name](8, 8, 1)
        for which, given in ((name, table), (f"{name} busy", schedules.without_idle(table))):
            function, args, sharded = build(8, 8, name, "full", given=given)
            cases[which] = function, (sharded.init(0), *args[1:])
        found[name] = sum(table.lengths()) / (8 * sum(table.work([op]) for op in (
            schedules.Op("F", 0), schedules.Op("B", 0), *[schedules.Op("W", 0)] * table.split)))
    seconds = alternate(cases, 5)
    return {"time / time without idle ticks at 8 stages, 8 microbatches (if idle ticks worked)": {
        name: [round(seconds[name] / seconds[f"{name} busy"], 3), round(worst, 2)] for name, worst in found.items()}}


def flops() -> dict:
    """Matmul FLOPs of all devices, counted in the compiled programs, over those of plain training with full remat."""
    microbatches, found = 16, {}
    plain = build(1, microbatches, PLAIN, "full")
    base = count(plain[0].lower(*plain[1]).compile().as_text(), {})
    for name, remat in (("1f1b", "full"), ("gpipe", "full"), ("zero_bubble", "full"), ("1f1b", "none")):
        function, args, sharded = build(4, microbatches, name, remat)
        table = schedules.make(sharded.config)
        found[f"{name}, remat {remat}"] = round(
            4 * count(function.lower(*args).compile().as_text(), shares(table, remat != "full")) / base, 3)
    return {"matmul FLOPs / plain training with full remat (at most 1.03)": found}


def shares(table: schedules.Schedule, save: bool) -> dict[tuple[int, str], float]:
    """(ticks of a loop, kind of op) -> in which share of the loop's ticks a stage really does it."""
    found = {}
    for begin, end, kinds in phases(table):
        ops = Counter(op.kind for row in table.ticks[begin:end] for cell in row for op in cell)
        if not save:  # the last part's forward is left out
            ops["F"] -= sum(op.kind == "F" for row in table.ticks[begin:end] for op in row[-1])
        found |= {(end - begin, kind): ops[kind] / (table.stages * (end - begin)) for kind in kinds}
        found[end - begin, "last"] = 1 / table.stages
    return found


def count(text: str, shares: dict[tuple[int, str], float]) -> float:
    """Matmul FLOPs of a compiled program on one device: loops as often as they run, branches by their share."""
    bodies, sizes = {}, {}
    for block in re.split(r"\n(?=\S)", text):
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block)
        if head and "{" in block:
            bodies[head[1]] = block.splitlines()[1:]
            for line in bodies[head[1]]:
                if found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line):
                    sizes[head[1], found[1]] = [int(n) for n in found[2].split(",") if n]
    entry = re.search(r"ENTRY %?([\w.\-]+)", text)[1]

    def walk(name: str, ticks: int) -> float:
        total = 0.0
        for line in bodies[name]:
            if found := re.search(r" = \w+\[([\d,]*)\]\S* dot\(([^)]*)\)", line):
                left = re.search(r"%([\w.\-]+)", found[2])[1]
                contracted = re.search(r"lhs_contracting_dims={([\d,]*)}", line)[1]
                out = [int(n) for n in found[1].split(",") if n]
                inner = [sizes[name, left][int(n)] for n in contracted.split(",") if n]
                total += 2 * float(np.prod(out)) * float(np.prod(inner))
            elif " while(" in line:
                times = int(re.search(r'known_trip_count":{"n":"(\d+)"', line)[1])
                looks = any((times, kind) in shares for kind in "FBW") and not ticks
                total += times * walk(re.search(r"body=%?([\w.\-]+)", line)[1], times if looks else ticks)
            elif " conditional(" in line:
                parts = re.search(r"branch_computations={([^}]*)}", line)
                names = ([n.strip().lstrip("%") for n in parts[1].split(",")] if parts else
                         [re.search(rf"{which}_computation=%?([\w.\-]+)", line)[1] for which in ("false", "true")])
                costs = [walk(name, ticks) for name in names]
                if max(costs):
                    kind = re.findall(r"(\w+)/cond", line)[-1]
                    share = shares[ticks, kind]
                    total += max(costs) * share + min(costs) * (1 - share)
            else:
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                    total += walk(called, ticks)
        return total

    return walk(entry, 0)


PARTS = {"bubbles": (bubbles, 1), "memory": (memory, 4), "flops": (flops, 4), "idle": (idle, 8),
         "compile_time": (compile_time, 16), "large": (large, 120)}


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--alone":
        function, devices = PARTS[sys.argv[2]]
        jax.config.update("jax_num_cpu_devices", devices)
        print(json.dumps(function(), indent=1, ensure_ascii=False))
        return
    for part in sys.argv[1:] or PARTS:
        subprocess.run([sys.executable, __file__, "--alone", part], check=True)


if __name__ == "__main__":
    main()

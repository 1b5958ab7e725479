"""Tables of pipeline schedules: complete, as idle as the formulas say, checked, written, drawn, lowered to slots."""

import csv
import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from moejax import config
from moejax.config import Config, ConfigError, Mesh, Train
from moejax.parallel import schedules
from moejax.parallel.pipeline import lower
from moejax.parallel.schedules import SCHEDULES, Op, Schedule

COSTS = [None, {"F": 1.0, "B": 2.0, "W": 3.0}, {"F": 0.3, "B": 1.1, "W": 0.2}]
SIZES = [(stages, count) for stages in range(1, 9) for count in sorted({1, 2, 3, stages, 2 * stages + 1, 3 * stages})]
CHUNKED = [(stages, stages * groups, chunks) for stages in range(1, 9) for groups in (1, 3) for chunks in (2, 3)]
ALL = [*((name, *size, 1) for name in SCHEDULES for size in SIZES), *(("interleaved", *size) for size in CHUNKED)]
SOME = [(name, stages, count, 1) for name in SCHEDULES for stages, count in ((2, 1), (2, 5), (3, 3), (4, 9), (5, 2))]
SOME += [("interleaved", *size) for size in ((1, 3, 2), (2, 4, 3), (3, 6, 2), (4, 4, 4))]


def made(name: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    return SCHEDULES[name](stages, microbatches, chunks)


def cell(text: str) -> tuple[Op, ...]:
    """"F3.1 B0" as ops."""
    parts = [(word[0], *word[1:].split(".")) for word in text.split()]
    return tuple(Op(kind, *map(int, numbers)) for kind, *numbers in parts)


def changed(schedule: Schedule, changes: dict[tuple[int, int], str]) -> Schedule:
    """The table with other ops in the cells (tick, stage)."""
    rows = [[cell(changes[tick, stage]) if (tick, stage) in changes else ops for stage, ops in enumerate(row)]
            for tick, row in enumerate(schedule.ticks)]
    return replace(schedule, ticks=tuple(map(tuple, rows)))


def spaced(schedule: Schedule) -> Schedule:
    """The same in single file: one op at a time anywhere, and a tick of nothing after each."""
    rows = []
    for _tick, stage, op in schedule.ops():
        rows += [tuple((op,) if s == stage else () for s in range(schedule.stages)), ((),) * schedule.stages]
    return replace(schedule, ticks=tuple(rows))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_passes_the_check(name: str):
    for kind, *size in ALL:
        if kind == name:
            schedule = made(name, *size)
            assert schedule.check() == [], size
            assert spaced(schedule).check() == []
            assert len(schedule.ops()) == (3 if name == "zero_bubble" else 2) * size[0] * size[1] * size[2]
            assert (schedule.stages, schedule.microbatches, schedule.chunks) == tuple(size)
            assert schedule.split == (name == "zero_bubble")


def test_the_names_are_those_of_the_config():
    assert tuple(SCHEDULES) == config.SCHEDULES


@pytest.mark.parametrize("costs", COSTS)
def test_bubbles_are_those_of_the_formulas(costs: dict[str, float] | None):
    for stages, count in SIZES:
        want = (stages - 1) / (count + stages - 1)
        for name in ("gpipe", "1f1b"):
            assert made(name, stages, count).bubble(costs) == pytest.approx(want, abs=1e-12)
    for stages, count, chunks in CHUNKED:
        want = (stages - 1) / (chunks * count + stages - 1)
        assert made("interleaved", stages, count, chunks).bubble(costs) == pytest.approx(want, abs=1e-12)


def test_zero_bubble_has_at_most_half_the_bubble_of_1f1b():
    for stages, count in SIZES:
        if stages > 1 and count >= 2 * stages:
            assert 0 < made("zero_bubble", stages, count).bubble() <= made("1f1b", stages, count).bubble() / 2


def test_a_tick_lasts_as_long_as_its_busiest_stage():
    costs = {"F": 1.0, "B": 10.0, "W": 100.0}
    assert made("1f1b", 2, 3).lengths(costs) == [1, 111, 111, 111, 110]  # B makes both gradients
    assert made("zero_bubble", 2, 4).lengths(costs) == [1, 11, 111, 111, 110, 100, 100]


def test_1f1b_holds_as_much_whatever_the_microbatches_and_gpipe_all_of_them():
    for stages in (2, 5):
        counts = [2 * stages, 4 * stages, 8 * stages]
        assert len({tuple(made("1f1b", stages, count).peak_inflight()) for count in counts}) == 1
        assert len({tuple(made("zero_bubble", stages, count).peak_inflight()) for count in counts}) == 1
        assert [made("gpipe", stages, count).peak_inflight() for count in counts] == [[n] * stages for n in counts]
    assert made("1f1b", 4, 8).peak_inflight() == [7, 5, 3, 1]


# The tables that are damaged.  1f1b of 2 stages and 3 microbatches:   zero_bubble of 2 stages and 4 microbatches:
#   tick       0   1     2     3     4                                  0   1     2       3       4     5   6
#   stage 0    F0  F1    F2B0  B1    B2                                 F0  F1    F2B0W0  F3B1W1  B2W2  B3  W3
#   stage 1    ·   F0B0  F1B1  F2B2  ·                                  ·   F0B0  F1B1W0  F2B2W1  F3B3  W2  W3
@pytest.mark.parametrize(("table", "changes", "said"), [
    (("1f1b", 2, 3), {(4, 0): ""}, ["stage 0 never does B of chunk 0 for microbatches 2"]),
    (("1f1b", 2, 3), {(3, 1): "F2"}, [
        "stage 1 never does B of chunk 0 for microbatches 2", "tick 4, stage 0: B2 waits for ever for B2 of part 1"]),
    (("1f1b", 2, 3), {(0, 0): ""}, [
        "stage 0 never does F of chunk 0 for microbatches 0", "tick 1, stage 1: F0 waits for ever for F0 of part 0",
        "tick 2, stage 0: B0 waits for ever for F0 of part 0"]),
    (("1f1b", 2, 3), {(4, 1): "F1"}, ["tick 4, stage 1: F1 was done before, in tick 2"]),
    (("1f1b", 2, 3), {(3, 0): "B1 B1"}, [
        *["tick 3, stage 0: B1 is not the only B there"] * 2, "tick 3, stage 0: B1 was done before, in tick 3"]),
    (("1f1b", 2, 3), {(3, 0): "B1 B2", (4, 0): ""}, [
        "tick 3, stage 0: B1 is not the only B there", "tick 3, stage 0: B2 is not the only B there",
        "tick 3, stage 0: B2 uses B2 of part 1 (stage 1) before it is there: it arrives for tick 4"]),
    (("1f1b", 2, 3), {(0, 1): "F0", (1, 1): "B0"}, [
        "tick 0, stage 1: F0 uses F0 of part 0 (stage 0) before it is there: it arrives for tick 1"]),
    (("1f1b", 2, 3), {(2, 0): "F2", (1, 0): "F1 B0"}, [
        "tick 1, stage 0: B0 uses B0 of part 1 (stage 1) before it is there: it arrives for tick 2"]),
    (("1f1b", 2, 3), {(1, 1): "F0 B1", (2, 1): "F1 B0", (2, 0): "F2", (3, 0): "B0", (4, 0): "B1 B2"}, [
        "tick 1, stage 1: B1 uses F1 of part 1 (stage 1) before it is there: it is done in tick 2",
        *[f"tick 4, stage 0: B{m} is not the only B there" for m in (1, 2)]]),
    (("zero_bubble", 2, 4), {(1, 0): "F1 W0", (2, 0): "F2 B0"}, [
        "tick 1, stage 0: W0 uses B0 of part 0 (stage 0) before it is there: it is done in tick 2"]),
    (("zero_bubble", 2, 4), {(6, 1): ""}, ["stage 1 never does W of chunk 0 for microbatches 3"]),
    (("zero_bubble", 2, 4), {(5, 0): ""}, [
        "stage 0 never does B of chunk 0 for microbatches 3", "tick 6, stage 0: W3 waits for ever for B3 of part 0"]),
    (("1f1b", 2, 3), {(4, 1): "F3"}, ["tick 4, stage 1: F3 is none of the ops F, B of 3 microbatches and 1 chunks"]),
    (("1f1b", 2, 3), {(4, 1): "B2.1"}, [
        "tick 4, stage 1: B2.1 is none of the ops F, B of 3 microbatches and 1 chunks"]),
    (("interleaved", 2, 2, 2), {(0, 1): "F0.2"}, [
        "tick 0, stage 1: F0.2 is none of the ops F, B of 2 microbatches and 2 chunks"]),
    (("interleaved", 2, 2, 2), {(2, 0): "F1.1", (3, 0): "F0.1"}, [  # chunk 1 of stage 0 follows chunk 0 of stage 1
        "tick 2, stage 0: F1.1 uses F1 of part 1 (stage 1) before it is there: it arrives for tick 3",
        "tick 3, stage 1: F0.1 uses F0 of part 2 (stage 0) before it is there: it arrives for tick 4"]),
])
def test_the_check_finds_damage_and_only_that(table, changes, said):
    problems = changed(made(*table), changes).check()
    assert len(problems) == len(said)
    for text in said:
        assert any(problem.startswith(text) for problem in problems), (text, problems)


def test_a_table_with_a_split_in_some_places_only_lacks_the_others():
    problems = changed(made("1f1b", 2, 3), {(4, 1): "W0"}).check()
    assert sorted(problems) == ["stage 0 never does W of chunk 0 for microbatches 0, 1, 2",
                                "stage 1 never does W of chunk 0 for microbatches 1, 2"]


def test_rows_of_another_length_are_named():
    good = made("1f1b", 2, 3)
    short = replace(good, ticks=(*good.ticks[:4], good.ticks[4][:1]))
    assert short.check() == ["tick 4 has 1 stages; the schedule has 2"]
    long = replace(good, ticks=((*good.ticks[0], ()), *good.ticks[1:]))
    assert long.check() == ["tick 0 has 3 stages; the schedule has 2"]


def test_all_problems_are_listed_at_once():
    problems = "\n".join(changed(made("1f1b", 2, 3), {
        (0, 1): "F0", (1, 1): "B0", (2, 1): "F1 B1 F7", (3, 0): "B1 B0", (4, 0): ""}).check())
    for text in ("tick 0, stage 1: F0 uses", "tick 2, stage 1: F7 is none of", "tick 3, stage 0: B0 was done before",
                 "tick 3, stage 0: B1 is not the only", "stage 0 never does B of chunk 0 for microbatches 2"):
        assert text in problems


def test_the_check_agrees_with_doing_the_ops_one_by_one():
    """Every table of a good one with two cells exchanged, against a slow twin that only plays the ticks."""
    def possible(schedule: Schedule) -> bool:
        done, last = set(), schedule.stages - 1
        for row in schedule.ticks:
            before = frozenset(done)
            for stage, ops in enumerate(row):
                for kind, m, _ in ops:
                    arrived = {"F": stage == 0 or ("F", m, stage - 1) in before,
                               "B": ("F", m, stage) in done and (stage == last or ("B", m, stage + 1) in before),
                               "W": ("B", m, stage) in done}
                    if not arrived[kind]:
                        return False
                    done.add((kind, m, stage))
        return True

    for name in ("1f1b", "zero_bubble"):
        good, found = made(name, 3, 3), set()
        for (tick, other), stage in itertools.product(itertools.combinations(range(len(good.ticks)), 2), range(3)):
            rows = [list(row) for row in good.ticks]
            rows[tick][stage], rows[other][stage] = rows[other][stage], rows[tick][stage]
            table = replace(good, ticks=tuple(map(tuple, rows)))
            assert (not table.check()) == possible(table), table.show()
            found.add(possible(table))
        assert found == {True, False}


def write(path: Path, schedule: Schedule, header: bool = False) -> Path:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        if header:
            out.writerow([f"stage {stage}" for stage in range(schedule.stages)])
        out.writerows([" ".join(map(str, ops)) for ops in row] for row in schedule.ticks)
    return path


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("size", [("1f1b", 3, 4), ("gpipe", 2, 12), ("zero_bubble", 3, 5), ("interleaved", 2, 4, 3)])
def test_a_table_comes_back_from_its_file(tmp_path: Path, size, header: bool):
    schedule = made(*size)
    path = write(tmp_path / "table.csv", schedule, header)
    found = schedules.read_csv(path, schedule.stages, schedule.microbatches, schedule.chunks)
    assert found == replace(schedule, name="table.csv")
    mesh = Mesh(pipeline=schedule.stages, schedule=str(path), chunks=schedule.chunks)
    assert schedules.make(Config(mesh=mesh, train=Train(microbatches=schedule.microbatches))) == found


def test_words_of_a_cell_may_come_in_any_order_with_any_space(tmp_path: Path):
    path = tmp_path / "table.csv"
    path.write_text('Stage A, stage B\nF0,\n\n"  B1.2\tF13 ", W3  B0 F0\n ,\n')
    ticks = schedules.read_csv(path, 2, 14, 3).ticks
    assert ticks == ((cell("F0"), ()), (cell("F13 B1.2"), cell("F0 B0 W3")), ((), ()))


@pytest.mark.parametrize("word", ["F", "f0", "X0", "F-1", "F1.x", "F0.1.1", "0", "F0,5", "B1;"])
def test_words_that_are_no_ops_are_named_with_their_place(tmp_path: Path, word: str):
    path = tmp_path / "table.csv"
    path.write_text(f'stage 0,stage 1\nF0,\nF1,"F0 {word}"\n"Q1",\n')
    with pytest.raises(ConfigError) as error:
        schedules.read_csv(path, 2, 3, 1)
    first, second = error.value.problems
    assert "tick 1, stage 1" in first and repr(word) in first and str(path) in first
    assert "tick 2, stage 0" in second and "'Q1'" in second


@pytest.mark.parametrize("text", ["", "\n\n", "stage 0,stage 1\n"])
def test_a_file_without_ticks_is_refused(tmp_path: Path, text: str):
    (tmp_path / "empty.csv").write_text(text)
    with pytest.raises(ConfigError, match="holds no tick"):
        schedules.read_csv(tmp_path / "empty.csv", 2, 3, 1)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00F0")
    for name in ("missing.csv", "binary.csv", "."):
        with pytest.raises(ConfigError) as error:
            schedules.read_csv(tmp_path / name, 2, 3, 1)
        assert str(tmp_path / name) in str(error.value) and "1f1b" in str(error.value)


@pytest.mark.parametrize(("changes", "said"), [
    ({(0, 0): ""}, "tick 1, stage 1: F0 waits for ever for F0 of part 0"),
    ({(0, 1): "F0", (1, 1): "B0"}, "tick 0, stage 1: F0 uses F0 of part 0 (stage 0) before it is there"),
])
def test_a_config_with_an_impossible_table_is_refused_with_tick_and_stage(tmp_path: Path, changes, said: str):
    path = write(tmp_path / "bad.csv", changed(made("1f1b", 2, 3), changes))
    with pytest.raises(ConfigError) as error:
        schedules.make(Config(mesh=Mesh(pipeline=2, schedule=str(path)), train=Train(microbatches=3)))
    assert any(said in problem and problem.startswith(str(path)) for problem in error.value.problems)


def test_a_table_for_other_stages_or_microbatches_is_refused(tmp_path: Path):
    path = write(tmp_path / "table.csv", made("1f1b", 2, 3))
    with pytest.raises(ConfigError, match="tick 0 has 2 stages; the schedule has 4"):
        schedules.make(Config(mesh=Mesh(pipeline=4, schedule=str(path)), train=Train(microbatches=3)))
    with pytest.raises(ConfigError, match="stage 1 never does F of chunk 0 for microbatches 3"):
        schedules.make(Config(mesh=Mesh(pipeline=2, schedule=str(path)), train=Train(microbatches=4)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_config_gets_the_schedule_it_names(name: str):
    chunks = 2 if name == "interleaved" else 1
    mesh = Mesh(pipeline=2, schedule=name, chunks=chunks)
    assert schedules.make(Config(mesh=mesh, train=Train(microbatches=4))) == made(name, 2, 4, chunks)


def test_show_has_a_line_per_stage():
    assert made("1f1b", 2, 3).show() == ("stage 0   F0   F1   F2B0 B1   B2\n"
                                         "stage 1   ·    F0B0 F1B1 F2B2 ·\n")
    assert "F0.1B0.1" in made("interleaved", 2, 2, 2).show()


@pytest.mark.parametrize("width", [40, 60, 100])
def test_show_leaves_out_the_middle_beyond_its_width(width: int):
    schedule = made("zero_bubble", 3, 40)
    lines = schedule.show(width).splitlines()
    assert len(lines) == 3
    assert all(len(line) <= width and line.count("…") == 1 for line in lines)
    whole = schedule.show(10_000).splitlines()
    for line, all_of_it in zip(lines, whole, strict=True):
        first, last = line.split("…")
        assert "…" not in all_of_it
        assert all_of_it.startswith(first.rstrip()) and all_of_it.endswith(last.lstrip())


@pytest.mark.parametrize("costs", COSTS)
def test_svg_has_a_rectangle_for_every_op_where_its_tick_is(costs: dict[str, float] | None):
    for size in (("1f1b", 3, 5, 1), ("zero_bubble", 4, 8, 1), ("interleaved", 2, 4, 2)):
        schedule = made(*size)
        picture = ElementTree.fromstring(schedule.svg(costs))
        space = "{http://www.w3.org/2000/svg}"
        rects = picture.findall(f"{space}rect")
        titles = [rect.findtext(f"{space}title") for rect in rects]
        assert sorted(titles) == sorted(f"tick {tick}, stage {stage}: {op}" for tick, stage, op in schedule.ops())
        assert [text.text for text in picture.iter(f"{space}text") if text.get("class") == "stage"] == [
            f"stage {stage}" for stage in range(schedule.stages)]
        places = sorted((float(rect.get("y")), float(rect.get("x")), float(rect.get("width"))) for rect in rects)
        for (y, x, wide), (below, then, _) in itertools.pairwise(places):
            assert below > y or x + wide <= then + .11  # rounded to tenths
        assert max(x + wide for _, x, wide in places) <= float(picture.get("viewBox").split()[2])


def test_without_idle_are_the_same_ops_and_no_bubble():
    for name, *size in SOME:
        schedule = made(name, *size)
        found = schedules.without_idle(schedule)
        assert sorted((stage, op) for _, stage, op in found.ops()) == sorted(
            (stage, op) for _, stage, op in schedule.ops())
        for costs in COSTS:
            assert found.bubble(costs) == pytest.approx(0, abs=1e-12)
        assert len(found.ticks) == schedule.microbatches * schedule.chunks
        assert found.split == schedule.split
        lower(found)


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), [
    (1, 3, 1), (2, 5, 1), (4, 2, 1), (4, 9, 1), (3, 3, 2), (3, 7, 2), (4, 1, 3), (2, 5, 4), (1, 2, 3)])
def test_forwards_do_every_part_once_and_after_the_one_before(stages: int, microbatches: int, chunks: int):
    schedule = schedules.forwards(stages, microbatches, chunks)
    assert len(schedule.ops()) == len(schedule.at) == stages * microbatches * chunks
    for (kind, m, part), tick in schedule.at.items():
        assert kind == "F" and (part == 0 or schedule.at["F", m, part - 1] < tick)
    assert all(len(ops) <= 1 for row in schedule.ticks for ops in row)
    assert all("F" not in problem and problem.startswith("stage") for problem in schedule.check())  # only B is missing
    simulate(schedule, train=False)


def simulate(schedule: Schedule, train: bool = True, save: bool = False):
    """Plays the plan on buffers whose values are the (microbatch, part) that they are meant for.

    Returns the plan.
    """
    plan, stages = lower(schedule, train, save), schedule.stages
    last, seen = stages * schedule.chunks - 1, []
    xs, saved, dys, owed = ([[None] * (size + 1) for _ in range(stages)] for size in plan[1:])
    y, dx = [None] * stages, [None] * stages  # of the tick before
    for tick in range(len(schedule.ticks)):
        row = [{name: int(column[tick, s]) for name, column in plan.columns.items()} for s in range(stages)]
        for s in range(stages):
            xs[s][row[s]["get_x"]] = y[s - 1]
            dys[s][row[s]["get_dy"]] = dx[(s + 1) % stages]
            xs[s][plan.inputs] = dys[s][plan.gradients] = None  # where nobody looks
        y, dx = [None] * stages, [None] * stages
        for s, r in enumerate(row):
            def op(kind: str, s: int = s, r: dict = r, tick: int = tick) -> tuple[int, int] | None:
                if not r[f"{kind}_on"]:
                    return None
                m, part = r[f"{kind}_m"], r[f"{kind}_chunk"] * stages + s
                assert (r[f"{kind}_first"], r[f"{kind}_last"]) == (part == 0, part == last)
                seen.append((tick, s, Op(kind.upper(), m, r[f"{kind}_chunk"])))
                return m, part

            if now := op("f"):
                assert now[1] == 0 or xs[s][r["f_slot"]] == now
                xs[s][r["f_slot"]] = now
                y[s] = now[0], now[1] + 1
                if save:
                    saved[s][r["f_save"]] = now
            if now := op("b"):
                assert (saved[s][r["b_saved"]] if save else xs[s][r["b_slot"]]) == now
                assert now[1] == last or dys[s][r["b_got"]] == now
                dx[s] = now[0], now[1] - 1
                if schedule.split:
                    owed[s][r["b_owed"]] = now
            if now := op("w"):
                assert owed[s][r["w_slot"]] == now
    left_out = [one for one in schedule.ops()
                if train and not save and one[2].kind == "F" and one[2].chunk * stages + one[1] == last]
    assert sorted(seen + left_out) == sorted(schedule.ops())
    return plan


@pytest.mark.parametrize(("name", "stages", "microbatches", "chunks"), SOME)
@pytest.mark.parametrize("save", [False, True])
def test_every_op_finds_its_microbatch_in_the_slot_it_is_told(name, stages, microbatches, chunks, save: bool):
    schedule = made(name, stages, microbatches, chunks)
    plan = simulate(schedule, save=save)
    assert plan.saved == (max(peaks(schedule, "F", "B")) if save else 0)
    assert plan.owed == (max(peaks(schedule, "B", "W")) if schedule.split else 0)
    simulate(spaced(schedule), save=save)


def peaks(schedule: Schedule, begin: str, end: str) -> list[int]:
    """Of every stage, the most that wait at once from one op to another."""
    at = schedule.at
    return [max(sum(at[begin, m, part] <= tick <= at[end, m, part] for kind, m, part in at
                    if kind == begin and part % schedule.stages == stage)
                for tick in range(len(schedule.ticks))) for stage in range(schedule.stages)]


def test_buffers_do_not_grow_with_the_microbatches_but_in_gpipe():
    def sizes(name: str, count: int, save: bool) -> tuple[int, ...]:
        return simulate(made(name, 4, count), save=save)[1:]

    for save in (False, True):
        for name in ("1f1b", "zero_bubble", "interleaved"):
            assert sizes(name, 8, save) == sizes(name, 16, save) == sizes(name, 32, save)
    assert sizes("1f1b", 16, False) == (7, 0, 1, 0)  # two for every stage that follows, and one
    assert sizes("1f1b", 16, True) == (1, 7, 1, 0)
    assert [sizes("gpipe", count, False)[0] for count in (8, 16)] == [8, 16]
    assert lower(made("1f1b", 4, 64), train=False).inputs == 1

"""`moejax checkpoint`: what lies in a run folder, whether it is as it was saved, and where two of them differ."""

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax import config as configs
from moejax.cli import main
from moejax.config import Checkpoint, Config, Data, Model, MoE
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train import archive, checkpoint
from moejax.train.checkpoint import Checkpoints, Position
from moejax.train.optimizer import make_optimizer
from moejax.train.state import State, fresh, trained

CONFIG = Config(
    name="x", data=Data(sequence=8, batch=4), checkpoint=Checkpoint(every=2),
    model=Model(layers=1, d_model=8, heads=2, head_dim=4, moe=MoE(experts=2, active=1, hidden=8)))
NAN, OTHER = (np.array([bits], np.uint32).view(np.float32)[0] for bits in (0x7FC00000, 0x7FC00001))


def state_of(config: Config, **numbers: np.ndarray) -> State:
    """The start of a run with some of its weights as given."""
    sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = fresh(sharded, make_optimizer(config.optimizer, 10, trained(sharded, sharded.axes)))
    weights = {name.replace("_", "."): value.copy() for name, value in numbers.items()}
    weights = {name: jax.device_put(value, sharded.shardings[name]) for name, value in weights.items()}
    assert all(state.weights[name].shape == value.shape for name, value in weights.items())
    return state._replace(weights=state.weights | weights)


def write(folder: Path, states: dict[int, State], config: Config = CONFIG) -> str:
    """A run folder with these states after these steps."""
    config = replace(config, run_dir=str(folder))
    folder.mkdir()
    (folder / "config.json").write_text(configs.to_json(config))
    with closing(Checkpoints(config)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(state, Position(step, 0))
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """a and b differ in the embedding and the norm at step 4; `other` has another optimizer and another width."""
    home = tmp_path_factory.mktemp("runs")
    embedding, norm = np.zeros((264, 8), np.float32), np.full(8, NAN)
    embedding[1, 2], embedding[5, 0], embedding[7, 7] = 1.0, 2.0, NAN
    a = state_of(CONFIG, embedding=embedding, norm_scale=norm)
    embedding[1, 2], embedding[5, 0] = 1.5, 2.125
    norm[3] = 0.25
    b = state_of(CONFIG, embedding=embedding, norm_scale=norm)
    wide = replace(CONFIG, optimizer=configs.Optimizer(name="adafactor"),
                   model=replace(CONFIG.model, moe=MoE(experts=2, active=1, hidden=16)))
    return {"a": write(home / "a", {2: a, 4: a}), "b": write(home / "b", {2: a, 4: b}),
            "other": write(home / "other", {4: state_of(wide)}, wide)}


@pytest.fixture
def copy(runs, tmp_path):
    """run -> a copy of it to damage."""
    return lambda name: shutil.copytree(runs[name], tmp_path / name)


def command(capfd, *words: str | Path) -> tuple[int, str, str]:
    status = main(["checkpoint", *map(str, words)])
    return status, *capfd.readouterr()


def flip(run: Path, step: int) -> None:
    """One bit of the largest file."""
    file = max((run / "checkpoints" / str(step)).glob("arrays/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def manifest(run: str | Path, step: int) -> Path:
    return Path(run) / "checkpoints" / str(step) / "manifest" / checkpoint.FILE.format(0)


def test_list(runs, capfd):
    status, out, err = command(capfd, "list", runs["a"])
    assert status == 0 and err == ""
    arrays = json.loads(json.loads(manifest(runs["a"], 2).read_text())["of"])["arrays"]
    size = 4 * sum(int(np.prod(one["shape"])) for one in arrays.values())  # every number of a state has 4 bytes
    lines = out.splitlines()
    # 2 steps of 4 sequences of 8 tokens
    start = f"step 2  64 tokens  {len(arrays)} arrays  {size / 1e6:.1f} MB  saved "
    assert len(lines) == 2 and lines[0].startswith(start) and lines[1].startswith("step 4  128 tokens  ")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", lines[0].removeprefix(start))
    status, out, _ = command(capfd, "list", runs["a"], "--json")
    assert status == 0 and out.count("\n") == 1
    rows = json.loads(out)["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0] == {"step": 2, "tokens": 64, "arrays": len(arrays), "bytes": size,
                       "saved": lines[0].removeprefix(start)}


def test_list_names_what_cannot_be_read(copy, capfd):
    run = copy("a")
    manifest(run, 2).write_text("{")
    status, out, _ = command(capfd, "list", run)
    assert status == 0 and out.splitlines()[0] == "step 2  damaged: its manifest cannot be read (JSONDecodeError)"
    assert out.splitlines()[1].startswith("step 4  128 tokens")


def test_verify(runs, capfd):
    assert command(capfd, "verify", runs["a"]) == (0, "step 2  good\nstep 4  good\n", "")
    status, out, _ = command(capfd, "verify", runs["a"], "--json")
    assert status == 0 and json.loads(out) == {"passed": True, "damaged": {}}


def test_verify_finds_damage_and_touches_nothing(copy, capfd):
    run = copy("a")
    flip(run, 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, out, _ = command(capfd, "verify", run)
    assert status == 1
    first, second = out.splitlines()
    assert re.fullmatch(r"step 2  damaged: 1 of its \d+ arrays are not as they were saved, first \S+", first)
    assert second == "step 4  good"
    status, out, _ = command(capfd, "verify", run, "--json")
    assert status == 1 and json.loads(out) == {"passed": False, "damaged": {"2": first.split("damaged: ")[1]}}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_verify_in_small_portions(runs, copy, capfd, monkeypatch):
    """As many arrays as fit are read at once; every one is checked."""
    monkeypatch.setattr(checkpoint, "AT_ONCE", 1000)
    portions, right = [], archive.read

    def read(manager, step, some):
        portions.append(sum(one.size * 4 for one in some.values()) if len(some) > 1 else 0)
        return right(manager, step, some)

    monkeypatch.setattr(archive, "read", read)
    assert archive.verify(runs["a"]) == {2: "", 4: ""}
    assert len(portions) > 8 and 0 < max(portions) <= 1000
    run = copy("a")
    flip(run, 4)
    found = archive.verify(str(run))
    assert found[2] == "" and "not as they were saved" in found[4]


def test_no_difference(runs, capfd):
    status, out, _ = command(capfd, "diff", runs["a"], runs["b"] + "@2")
    assert status == 0 and re.fullmatch(r"all bits of \d+ arrays are equal\n", out)
    status, out, _ = command(capfd, "diff", runs["a"] + "@2", runs["a"], "--json")
    found = json.loads(out)
    assert status == 0 and found["passed"] and found["differ"] == {}
    assert (found["a"], found["b"]) == (f"{runs['a']}/checkpoints@2", f"{runs['a']}/checkpoints@4")


def test_what_differs_is_named_with_its_count_and_first_place(runs, capfd):
    status, out, _ = command(capfd, "diff", runs["a"], runs["b"])
    assert status == 1
    lines = out.splitlines()
    # of 264 × 8, beside a NaN that is the same in both
    assert lines[0] == ("weights/embedding  2 of 2112 entries differ, by at most 0.5; first at [1, 2]: 1.0 and 1.5")
    assert lines[1].startswith("weights/norm.scale  1 of 8 entries differ") and lines[1].endswith(
        "first at [3]: nan and 0.25")
    assert re.fullmatch(r"2 of \d+ arrays differ between .*/a/checkpoints@4 and .*/b/checkpoints@4", lines[2])
    status, out, err = command(capfd, "diff", runs["a"], runs["b"], "--json")
    found = json.loads(out)
    assert status == 1 and not found["passed"] and err == ""
    assert [f"{name}  {what}" for name, what in found["differ"].items()] == lines[:2]


def test_arrays_that_only_one_has_and_those_of_another_shape(runs, capfd):
    status, out, _ = command(capfd, "diff", runs["a"], runs["other"], "--json")
    differ = json.loads(out)["differ"]
    assert status == 1
    assert differ["optimizer/0/mu/embedding"] == f"only in {runs['a']}"
    assert any(name.startswith("optimizer/") and what == f"only in {runs['other']}" for name, what in differ.items())
    assert differ["weights/runs.0.0.feed.down"] == "float32[1, 2, 8, 8] and float32[1, 2, 16, 8]"
    assert "health/loss" not in differ


def test_a_difference_between_damaged_ones_is_none(copy, runs, capfd):
    run = copy("a")
    flip(run, 4)
    status, out, err = command(capfd, "diff", runs["a"], run)
    assert status == 1 and out == "" and "not as they were saved" in err
    assert f"step 4 in {run}/checkpoints is damaged" in err  # which of the two
    assert command(capfd, "diff", runs["a"], f"{run}@2")[0] == 0


def test_a_run_with_an_at_sign_in_its_name(runs, tmp_path, capfd):
    shutil.copytree(runs["a"], tmp_path / "x@2")
    assert "@4" in json.loads(command(capfd, "diff", tmp_path / "x@2", runs["a"], "--json")[1])["a"]
    assert "@2" in json.loads(command(capfd, "diff", tmp_path / "x@2@2", runs["a"], "--json")[1])["a"]


def test_checkpoints_in_another_folder(runs, tmp_path, capfd):
    shutil.copytree(runs["a"], tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "disk")
    config = replace(CONFIG, checkpoint=Checkpoint(folder=str(tmp_path / "disk")))
    (tmp_path / "run" / "config.json").write_text(configs.to_json(config))
    assert command(capfd, "verify", tmp_path / "run")[:2] == (0, "step 2  good\nstep 4  good\n")


@pytest.mark.parametrize("words, problem", [
    (("list", "{home}/none"), "what is meant is a run folder; {home}/none holds no config.json; name another"),
    (("verify", "{home}/empty"), "a run folder holds checkpoints; {home}/empty has none; train it first"),
    (("diff", "{a}", "{a}@3"), "RUN@STEP names a checkpoint; {a} has none of step 3; it has steps 2, 4"),
    (("diff", "{a}"), "checkpoint diff takes two runs; got 1"),
    (("verify", "{a}", "{a}"), "checkpoint verify takes one run; got 2"),
    (("lsit", "{a}"), "moejax checkpoint takes list, verify or diff; got 'lsit'")])
def test_what_is_asked_for_wrongly(runs, tmp_path, capfd, words, problem):
    places = {"home": tmp_path, "a": runs["a"]}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(configs.to_json(replace(CONFIG, run_dir="x")))
    status, out, err = command(capfd, *(word.format(**places) for word in words))
    assert status == 2 and out == ""
    assert err.startswith(f"moejax checkpoint: 1 problem\n  - {problem.format(**places)}")


@pytest.mark.parametrize("a, b, what", [
    (np.float32([1, NAN]), np.float32([1, NAN]), ""), (np.int32([[3]]), np.int32([[3]]), ""),
    (np.float32(2), np.float32(2), ""), (np.array([True]), np.array([True]), ""),
    (np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32), ""),
    (np.float32([0.0]), np.float32([-0.0]), "1 of 1 entries differ, by at most 0; first at [0]: 0.0 and -0.0"),
    (np.int32(7), np.int32(4), "1 of 1 entries differ, by at most 3; first at [0]: 7 and 4"),
    (np.uint8([[1, 2], [3, 4]]), np.uint8([[1, 2], [9, 0]]),
     "2 of 4 entries differ, by at most 6; first at [1, 0]: 3 and 9"),
    (np.array([True, False]), np.array([True, True]),
     "1 of 2 entries differ, by at most 1; first at [1]: False and True"),
    (np.array([1, 2], ml_dtypes.bfloat16), np.array([1, 2.5], ml_dtypes.bfloat16),
     "1 of 2 entries differ, by at most 0.5; first at [1]: 2.0 and 2.5"),
    (np.float32([np.inf]), np.float32([-np.inf]), "1 of 1 entries differ, by at most inf; first at [0]: inf and -inf"),
    (np.array([NAN, 1], np.float32), np.array([OTHER, 3], np.float32),
     "2 of 2 entries differ, by at most 2; first at [0]: nan and nan"),
    (np.array([NAN, 1], np.float32), np.array([1, 1], np.float32),
     "1 of 2 entries differ, by at most nan; first at [0]: nan and 1.0")])
def test_two_arrays(a, b, what):
    assert archive.compare(np.asarray(a), np.asarray(b)) == what

"""A whole run, small: what it records, how it goes on after a stop, and what it refuses."""

import json
import math
import shutil
import typing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from moejax import config as configs
from moejax.config import Checkpoint, Config, ConfigError, Data, Mesh, Model, MoE, Optimizer, Train
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train.checkpoint import restore_weights
from moejax.train.loop import Diverged, claim, train
from moejax.train.metrics import read_metrics

KEYS = {"step", "loss", "balance_loss", "z_loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "drop_fraction",
        "expert_load", "step_s"}
TIMES = {"tokens_per_s", "mfu", "step_s"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(8):
        (folder / f"{n}.txt").write_text(" ".join(f"{(7 * n + i * i) % 100} apples" for i in range(60)))
    return folder


@pytest.fixture(scope="module")
def config(text, tmp_path_factory) -> Config:
    """6 steps whose learning rate does not ask how many there are."""
    home = tmp_path_factory.mktemp("runs")
    return Config(
        name="x", run_dir=str(home / "whole"), mesh=Mesh(fake_devices=1),
        model=Model(layers=2, pattern="DM", d_model=16, heads=2, head_dim=8, hidden=16,
                    moe=MoE(experts=4, hidden=16, router="sigmoid", jitter=0.1)),
        data=Data(sources=(str(text),), sequence=16, batch=8, validation=0.3, cache=str(home / "cache")),
        optimizer=Optimizer(lr=1e-2, warmup=2, schedule="rsqrt"), train=Train(steps=6, eval_every=3, eval_batches=2),
        checkpoint=Checkpoint(every=2, keep=2))


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """The run folder of the run that nothing interrupts."""
    last = train(config)
    run_dir = Path(config.run_dir)
    assert last == read_metrics(run_dir)[-1]
    return run_dir


def elsewhere(config: Config, folder: str, **changes) -> Config:
    return replace(config, run_dir=str(Path(config.run_dir).with_name(folder)), **changes)


def numbers(run_dir: str | Path) -> list[dict]:
    """The records without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(Path(run_dir))]


def weights_of(config: Config, run_dir: str | Path) -> dict[str, np.ndarray]:
    return jax.device_get(restore_weights(Path(run_dir), Sharded(config, make_mesh(Mesh(), jax.devices()[:1]))))


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def problem_of(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        train(config)
    (found,) = error.value.problems
    return found


def test_the_record_of_a_run(whole, config):
    records = read_metrics(whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        extra = {"unigram_loss"} if record["step"] == 1 else {"validation_loss"} if record["step"] in (3, 6) else set()
        assert set(record) == KEYS | extra
        assert record["tokens"] == record["step"] * 8 * 16
        assert record["tokens_per_s"] * record["step_s"] == pytest.approx(8 * 16)
        assert 0 < record["mfu"]
        assert np.shape(record["drop_fraction"]) == (1,) and 0 <= record["drop_fraction"][0] < 0.6
        assert np.shape(record["expert_load"]) == (1, 4) and sum(record["expert_load"][0]) == pytest.approx(1)
        assert record["grad_norm"] > 0 and record["z_loss"] > 0 and record["balance_loss"] >= 0.99
    # rate / 2, rate, and then × sqrt(2 / step)
    rates = [0.005, 0.01, 0.01, *(0.01 * math.sqrt(2 / step) for step in (3, 4, 5))]
    assert [record["lr"] for record in records] == pytest.approx(rates)


def test_it_learns(whole):
    losses = [record["loss"] for record in read_metrics(whole)]
    assert 5 < losses[0] < 6.5 and losses[-1] < losses[0] - 1  # log 264 is 5.6
    seen = [record["validation_loss"] for record in read_metrics(whole) if "validation_loss" in record]
    assert seen[1] < seen[0] < losses[0] and abs(seen[1] - losses[-1]) < 0.5
    assert 1.5 < read_metrics(whole)[0]["unigram_loss"] < 3.5


def test_what_a_run_folder_holds(whole, config):
    assert {"config.json", "metrics.jsonl", "checkpoints", "summary.json"} <= {path.name for path in whole.iterdir()}
    assert configs.from_json((whole / "config.json").read_text()) == config
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["4", "6"]
    summary = json.loads((whole / "summary.json").read_text())
    weights = weights_of(config, whole)
    assert summary["parameters"] == sum(value.size for value in weights.values())
    # of the four experts two work on a token
    experts = sum(value.size for name, value in weights.items() if name.endswith(("feed.up", "feed.down")))
    assert summary["active_parameters"] == summary["parameters"] - experts // 2


def test_stopped_and_resumed_is_the_same_run(whole, config):
    part = elsewhere(config, "part")
    train(replace(part, train=replace(config.train, steps=3, log_every=1)))
    assert [record["step"] for record in read_metrics(Path(part.run_dir))] == [1, 2, 3]
    last = train(part)
    assert numbers(part.run_dir) == numbers(whole)
    assert last == read_metrics(Path(part.run_dir))[-1]
    expected, found = weights_of(config, whole), weights_of(config, part.run_dir)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_killed_run_goes_on_from_its_checkpoint_on_another_mesh(whole, config):
    """As if it was killed after the record of step 6 and before its checkpoint: 5 and 6 are done again."""
    other = elsewhere(config, "killed", mesh=Mesh(data=2, expert=2, tensor=2, zero1=True, fake_devices=8), name="y",
                      checkpoint=Checkpoint(every=5))
    shutil.copytree(whole, other.run_dir)
    shutil.rmtree(Path(other.run_dir) / "checkpoints" / "6")
    train(other)
    expected, found = numbers(whole), numbers(other.run_dir)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert found[:4] == expected[:4]
    for mine, theirs in zip(found[4:], expected[4:], strict=True):
        # the second of them comes after an AdamW step, which magnifies the rounding of small gradients
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert found[5]["validation_loss"] == pytest.approx(expected[5]["validation_loss"], rel=1e-4)
    assert configs.from_json((Path(other.run_dir) / "config.json").read_text()) == other


def test_a_run_that_is_done_stays_as_it_is(whole, config, capfd):
    before = {name: data for name, data in files(whole).items() if "tensorboard" not in name}
    assert train(config) == read_metrics(whole)[-1]
    assert {name: data for name, data in files(whole).items() if "tensorboard" not in name} == before
    assert train(replace(config, train=replace(config.train, steps=2))) == read_metrics(whole)[-1]
    assert f"{whole} has done 6 of 2 steps already; set train.steps higher to go on" in capfd.readouterr().err
    assert read_metrics(whole)[-1]["step"] == 6
    train(config)  # as the other tests expect it


def test_another_config_is_refused_and_nothing_is_touched(whole, config):
    before = files(whole)
    other = replace(config, optimizer=replace(config.optimizer, lr=2e-2), train=replace(config.train, seed=3, steps=9))
    assert problem_of(other) == (
        f"a run folder holds one run; {whole} was begun with another config (optimizer.lr is 0.01 there and 0.02 here; "
        "train.seed is 0 there and 3 here); set run_dir to a new folder, or undo the difference")
    assert files(whole) == before


FREE = {"name", "run_dir", "mesh.data", "mesh.fsdp", "mesh.pipeline", "mesh.expert", "mesh.tensor", "mesh.sequence",
        "mesh.zero1", "mesh.schedule", "mesh.chunks", "mesh.stage_layers", "mesh.fake_devices",
        "data.cache", "train.steps", "train.microbatches", "train.remat",
        "train.eval_every", "train.eval_batches", "train.log_every", "checkpoint.every", "checkpoint.keep",
        "model.moe.dispatcher"}


def another(field: str, kind, value):
    """A value that the field may have instead; None if there is none."""
    if typing.get_origin(kind) is Literal:
        return next((option for option in typing.get_args(kind) if option != value), None)
    if isinstance(value, bool):
        return not value
    if typing.get_origin(kind) is tuple:
        return (another(field, typing.get_args(kind)[0], typing.get_args(kind)[0]()),)
    return {int: 3, float: 0.125, str: "b", type(None): 3}[type(value)]


@pytest.mark.parametrize("field", [name for name, _ in configs.leaves(Config())])
def test_what_may_change_in_a_run_folder(tmp_path, config, field):
    """The layout, names and the loop's own chores; nothing that decides what a step learns."""
    config = replace(config, run_dir=str(tmp_path / "b"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(configs.to_json(replace(config, run_dir="moved")))
    kind, value = dict(configs.leaves(config))[field]
    other = another(field, kind, value)
    if field == "run_dir" or other is None:
        other = value
    changed = configs.put(config, field.split("."), other)
    if field in FREE or other == value:
        assert claim(changed) == tmp_path / "b"
    else:
        with pytest.raises(ConfigError, match=f"{field} is "):
            claim(changed)


def test_a_folder_with_other_files_is_refused(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("all my work")
    before = files(tmp_path)
    assert problem_of(replace(config, run_dir=str(tmp_path))) == (
        f"a run needs a folder of its own; {tmp_path} holds other files; set run_dir to a new folder")
    assert files(tmp_path) == before


def test_a_file_is_no_run_folder(tmp_path, config):
    path = tmp_path / "file"
    path.write_text("text")
    assert problem_of(replace(config, run_dir=str(path))) == (
        f"run_dir is a folder; {path} is a file; set run_dir to another path")
    found = problem_of(replace(config, run_dir=str(path / "below")))
    assert found.startswith(f"run_dir must name a folder that can be written; {path}/below is not (")
    assert files(tmp_path) == {str(path): b"text"}


def test_a_damaged_config_is_not_another_one(tmp_path, config):
    (tmp_path / "config.json").write_text('{"name": ')
    assert "a config is a JSON object; this text is not" in problem_of(replace(config, run_dir=str(tmp_path)))
    assert files(tmp_path) == {str(tmp_path / "config.json"): b'{"name": '}


def test_a_config_that_could_not_begin_leaves_the_folder_free(tmp_path, config):
    """Wrong sources, say: with the right ones the same folder is as good as new."""
    wrong = replace(config, run_dir=str(tmp_path / "run"), data=replace(config.data, sources=("nowhere.txt",)))
    assert "'nowhere.txt' matches no file" in problem_of(wrong)
    assert claim(replace(config, run_dir=str(tmp_path / "run"))) == tmp_path / "run"
    assert files(tmp_path / "run") == {}


def test_a_loss_that_is_no_number_stops_the_run(config):
    """Weights of 1e30 after the first step: the loss of the second overflows.  Without experts and validation."""
    wild = elsewhere(config, "wild", optimizer=replace(config.optimizer, lr=1e30), checkpoint=Checkpoint(every=1),
                     model=replace(config.model, layers=1, pattern="D"), data=replace(config.data, validation=0.0))
    with pytest.raises(Diverged) as error:
        train(wild)
    run_dir = Path(wild.run_dir)
    first, second = read_metrics(run_dir)
    assert (first["step"], second["step"]) == (1, 2)
    assert set(first) == KEYS and first["drop_fraction"] == first["expert_load"] == []
    assert first["loss"] is not None and None in (second["loss"], second["grad_norm"])
    assert str(error.value).startswith("loss and gradient norm must be finite; at step 2 they are ")
    assert f"; the checkpoint of step 1 in {run_dir} is kept; lower optimizer.lr" in str(error.value)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["1"]
    assert all(np.all(np.isfinite(value)) for value in weights_of(wild, run_dir).values())

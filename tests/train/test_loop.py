"""A whole run, small: what it records, how it goes on after a stop or bad data, and what it refuses."""

import itertools
import json
import math
import os
import shutil
import signal
import time
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from moejax import config as configs
from moejax.config import Checkpoint, Config, ConfigError, Data, Fault, Mesh, Model, MoE, Optimizer, Train
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train import loop
from moejax.train.checkpoint import Checkpoints, restore_weights
from moejax.train.fault import RunFailed
from moejax.train.loop import claim, train
from moejax.train.metrics import read_events, read_lines, read_metrics

KEYS = {"step", "loss", "balance_loss", "z_loss", "grad_norm", "lr", "bad", "skipped", "tokens", "tokens_per_s", "mfu",
        "drop_fraction", "expert_load", "step_s", "wall_s", "goodput", "input_share"}
TIMES = {"tokens_per_s", "mfu", "step_s", "wall_s", "goodput", "input_share"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(8):
        (folder / f"{n}.txt").write_text(" ".join(f"{(7 * n + i * i) % 100} apples" for i in range(60)))
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What is compiled is kept for the next run."""
    options = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
               "jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(text, programs, tmp_path_factory) -> Config:
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


def numbers(run_dir: str | Path, read: Callable[[Path], list[dict]] = read_metrics) -> list[dict]:
    """The records without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read(Path(run_dir))]


def weights_of(config: Config, run_dir: str | Path) -> dict[str, np.ndarray]:
    return jax.device_get(restore_weights(Path(run_dir), Sharded(config, make_mesh(Mesh(), jax.devices()[:1]))))


def productive(record: dict) -> float:
    return record["goodput"] * record["wall_s"]


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
        assert record["bad"] == record["skipped"] == 0
    # of the first step most is compilation
    assert [record["goodput"] > 0 for record in records] == [False, True, True, True, True, True]
    for before, after in itertools.pairwise(records):
        assert before["wall_s"] + after["step_s"] <= after["wall_s"] + 1e-6
        assert productive(after) == pytest.approx(productive(before) + after["step_s"])
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
    assert summary["parameters"] == sum(
        value.size for name, value in weights.items() if not name.endswith(".bias"))  # which the load moves
    # of the four experts two work on a token
    experts = sum(value.size for name, value in weights.items() if name.endswith(("feed.up", "feed.down")))
    assert summary["active_parameters"] == summary["parameters"] - experts // 2


def test_stopped_and_resumed_is_the_same_run(whole, config):
    part = elsewhere(config, "part")
    train(replace(part, train=replace(config.train, steps=3, log_every=1)))
    assert [record["step"] for record in read_metrics(Path(part.run_dir))] == [1, 2, 3]
    before = read_metrics(Path(part.run_dir))[-1]
    last = train(part)
    after = read_metrics(Path(part.run_dir))[3]
    assert after["wall_s"] > before["wall_s"] + after["step_s"]  # all processes count
    assert productive(after) == pytest.approx(productive(before))  # but not their first steps
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
        "train.eval_every", "train.eval_batches", "train.log_every", "train.fault.loss_spike", "train.fault.norm_spike",
        "train.fault.limit", "train.fault.stall", "train.fault.heartbeat", "checkpoint.every", "checkpoint.keep",
        "checkpoint.keep_every", "checkpoint.folder", "model.moe.dispatcher"}


def another(field: str, kind, value):
    """A value that the field may have instead; None if there is none."""
    if typing.get_origin(kind) is Literal:
        return next((option for option in typing.get_args(kind) if option != value), None)
    if isinstance(value, bool):
        return not value
    if typing.get_origin(kind) is tuple:
        inside = typing.get_args(kind)[0]
        return (another(field, inside, inside() if isinstance(inside, type) else None),)
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
    for run_dir in (path, path / "below"):
        found = problem_of(replace(config, run_dir=str(run_dir)))
        assert found.startswith(f"run_dir must name a folder that can be written; {run_dir} is not (")
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


def test_weights_that_give_no_number_end_the_run(config):
    """They are 1e30 after the first step: the loss of all others overflows.  Without experts and validation."""
    wild = elsewhere(config, "wild", optimizer=replace(config.optimizer, lr=1e30), checkpoint=Checkpoint(every=1),
                     train=replace(config.train, fault=Fault(limit=2)),
                     model=replace(config.model, layers=1, pattern="D"), data=replace(config.data, validation=0.0))
    with pytest.raises(RunFailed) as error:
        train(wild)
    run_dir = Path(wild.run_dir)
    first, second, third = read_metrics(run_dir)
    assert [record["bad"] for record in (first, second, third)] == [0, 1, 2]
    assert set(first) == KEYS and first["drop_fraction"] == first["expert_load"] == []
    assert first["loss"] is not None and None in (second["loss"], second["grad_norm"])
    assert str(error.value).startswith(
        "after train.fault.limit = 2 bad steps in a row a run goes back to a checkpoint, at most 3 times to the same; "
        "at step 3 loss and gradient norm are ")
    assert ", and it has gone back 3 times; the checkpoint of step 1 is kept; lower optimizer.lr" in str(error.value)
    assert [(event["step"], event["to"], event["offset"]) for event in read_events(run_dir)] == [
        (3, 1, 2), (3, 1, 4), (3, 1, 6)]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["1"]
    assert all(np.all(np.isfinite(value)) for value in weights_of(wild, run_dir).values())


# Bad data and signals.  Batches count from 0, so that step 1 takes batch 0.


class Killed(Exception):
    """Stands for the sudden end of the process."""


@pytest.fixture(scope="module")
def small(config) -> Config:
    """8 steps of a smaller model; two bad steps in a row and it goes back."""
    return replace(config, train=replace(config.train, steps=8, eval_every=4, fault=Fault(limit=2)),
                   model=replace(config.model, layers=1, pattern="M"))


@pytest.fixture
def feed(monkeypatch):
    """feed(bad, at=…) lets the batches in `bad` have no number for a loss, and calls what `at` has for a batch once."""
    right = loop.train_batch

    def feed(bad: typing.Container[int] = (), at: dict[int, Callable[[], None]] | None = None,
             order: Callable[[int], int] = lambda number: number) -> list[int]:
        asked, at = [], dict(at or {})

        def train_batch(samples, batch: int, number: int) -> Batch:
            asked.append(number)
            at.pop(number, lambda: None)()
            found = right(samples, batch, order(number))
            return found._replace(weights=found.weights * np.float32(np.nan)) if number in bad else found

        monkeypatch.setattr(loop, "train_batch", train_batch)
        return asked

    return feed


def kill() -> None:
    raise Killed


def assert_same_run(config: Config, a: Path, b: Path) -> None:
    """Records, also of what was done again, and weights."""
    assert numbers(a, lambda run: read_lines(run / "metrics.jsonl")) == numbers(
        b, lambda run: read_lines(run / "metrics.jsonl"))
    assert_same_weights(config, a, b)


def assert_same_weights(config: Config, a: Path, b: Path) -> None:
    expected, found = weights_of(config, a), weights_of(config, b)
    for name, value in expected.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name


def test_a_bad_batch_is_skipped_and_counted(small, feed, capfd):
    """And not saved: step 4 would be.  That the record of step 2 cannot be written at first changes nothing."""
    one = elsewhere(small, "one-bad", checkpoint=Checkpoint(every=2, keep=9))
    file, away = (Path(one.run_dir) / name for name in ("metrics.jsonl", "away"))

    def block() -> None:
        file.rename(away)
        file.mkdir()

    def free() -> None:
        file.rmdir()
        away.rename(file)

    feed({3}, {1: block, 2: free})
    last = train(one)
    records = read_metrics(Path(one.run_dir))
    assert [record["bad"] for record in records] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert [record["skipped"] for record in records] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert last == records[-1] and records[3]["loss"] is None and records[4]["loss"] > 0
    assert productive(records[3]) == pytest.approx(productive(records[2]))
    assert productive(records[4]) == pytest.approx(productive(records[3]) + records[4]["step_s"])
    assert sorted(path.name for path in (Path(one.run_dir) / "checkpoints").iterdir()) == ["2", "5", "6", "8"]
    assert read_events(Path(one.run_dir)) == []
    err = capfd.readouterr().err
    assert "step 4 is bad, 1 in a row: loss nan, gradient norm nan; its update is skipped\n" in err
    assert f"the record of step 2 could not be written ([Errno 21] Is a directory: '{file}'); trying again after the " \
        "next\n" in err


@pytest.fixture
def rewound(small, feed, monkeypatch):
    """A run whose batches 4 and 5 are bad.  Going back takes half a second."""
    config, restore = elsewhere(small, "rewound"), Checkpoints.restore

    def slowly(*args, **kwargs):
        time.sleep(0.5 if "before" in kwargs else 0)
        return restore(*args, **kwargs)

    if not Path(config.run_dir).exists():  # once for all tests
        monkeypatch.setattr(Checkpoints, "restore", slowly)
        asked = feed({4, 5})
        train(config)
        assert asked == list(range(10))
        monkeypatch.undo()
    return Path(config.run_dir)


def test_bad_batches_in_a_row_send_the_run_back_and_past_them(small, rewound, feed):
    lines = read_lines(rewound / "metrics.jsonl")
    assert lines[6] == {"event": "rewind", "step": 6, "to": 4, "offset": 2}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6, 5, 6, 7, 8]
    assert [line.get("bad") for line in lines] == [0, 0, 0, 0, 1, 2, None, 0, 0, 0, 0]
    records = read_metrics(rewound)
    assert [record["step"] for record in records] == list(range(1, 9)) and records[-1]["skipped"] == 0
    assert sorted(path.name for path in (rewound / "checkpoints").iterdir()) == ["6", "8"]
    # as if those batches had never been there
    without = elsewhere(small, "without")
    asked = feed(order=lambda number: number if number < 4 else number + 2)
    train(without)
    assert asked == list(range(8))
    assert numbers(without.run_dir) == numbers(rewound)
    assert_same_weights(small, Path(without.run_dir), rewound)


def test_going_back_is_no_good_use_of_time(rewound):
    lines = read_lines(rewound / "metrics.jsonl")
    good, bad, again = lines[3], lines[5], lines[7]
    assert again["wall_s"] > bad["wall_s"] + 0.5 and again["step_s"] < 0.5
    # of the steps after 4, what was done before going back has come to nothing
    assert productive(bad) == pytest.approx(productive(good))
    assert productive(again) == pytest.approx(productive(good) + again["step_s"])


def test_killed_and_resumed_around_going_back_is_the_same_run(small, rewound, feed, capfd):
    """Before it, after it, and after the first checkpoint with the batches behind it."""
    killed = elsewhere(small, "killed-around")
    for at, expected in ((5, range(6)), (7, range(4, 8)), (8, [4, 5, 6, 7, 8]), (None, [8, 9])):
        asked = feed({4, 5}, {at: kill})
        if at is None:
            train(killed)
        else:
            with pytest.raises(Killed):
                train(killed)
        assert asked == list(expected)
    assert_same_run(small, Path(killed.run_dir), rewound)
    err = capfd.readouterr().err
    assert err.count("resumed after step 4") == 2 and err.count("resumed after step 6") == 1
    assert err.count("back to the checkpoint of step 4, and past the data up to here") == 2


def test_going_back_at_once_after_a_save(small, feed):
    """The checkpoint may still be on its way to the disk."""
    quick = elsewhere(small, "quick", checkpoint=Checkpoint(every=1),
                      train=replace(small.train, steps=4, fault=Fault(limit=1)))
    asked = feed({1, 3})
    train(quick)
    assert asked == list(range(6))
    assert [(event["step"], event["to"], event["offset"]) for event in read_events(Path(quick.run_dir))] == [
        (2, 1, 1), (3, 2, 2)]


def test_bad_batches_for_ever(small, feed):
    """It stops, and from what it leaves another learning rate, say, can go on."""
    lost = elsewhere(small, "lost")
    asked = feed(range(4, 1000))
    with pytest.raises(RunFailed) as error:
        train(lost)
    # steps 5 and 6, then three times again from step 4
    assert asked == list(range(12))
    assert "and it has gone back 3 times; the checkpoint of step 4 is kept; " in str(error.value)
    assert [event["offset"] for event in read_events(Path(lost.run_dir))] == [2, 4, 6]
    assert sorted(path.name for path in (Path(lost.run_dir) / "checkpoints").iterdir()) == ["2", "4"]


def test_bad_batches_before_the_first_checkpoint(small, feed, capfd):
    """The first of them is late too."""
    lost = elsewhere(small, "lost-at-once", train=replace(small.train, fault=Fault(limit=2, stall=0.1)))
    asked = feed(range(1000), {0: lambda: time.sleep(0.5)})
    with pytest.raises(RunFailed, match="it has gone back 0 times; no checkpoint was written; lower optimizer"):
        train(lost)
    assert asked == [0, 1] and read_events(Path(lost.run_dir)) == []
    assert "host 0 of 1 has been reading the batch of step 1 for 0 s\n" in capfd.readouterr().err


@pytest.fixture
def term():
    """Sends the signal that asks a process to end."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_by_a_signal_and_resumed_is_the_same_run(small, rewound, feed, term, capfd):
    """In the middle of step 3, which is not a multiple of checkpoint.every."""
    stopped = elsewhere(small, "stopped")
    feed({4, 5}, {2: term})
    record = train(stopped)
    assert record["stopped"] == "SIGTERM" and record["step"] == 3
    assert {key: value for key, value in record.items() if key != "stopped"} == read_metrics(Path(stopped.run_dir))[-1]
    assert sorted(path.name for path in (Path(stopped.run_dir) / "checkpoints").iterdir()) == ["2", "3"]
    assert "stopped by SIGTERM after step 3; the same command goes on from there\n" in capfd.readouterr().err
    asked = feed({4, 5})
    assert "stopped" not in train(stopped)
    assert asked == list(range(3, 10)) and "resumed after step 3" in capfd.readouterr().err
    assert_same_run(small, Path(stopped.run_dir), rewound)


def test_stopped_by_a_signal_at_a_bad_step(small, rewound, feed, term):
    """It goes on from that very step too, and knows how many were bad."""
    stopped = elsewhere(small, "stopped-bad", checkpoint=Checkpoint(every=4))
    feed({4, 5}, {4: term})
    assert train(stopped)["stopped"] == "SIGTERM"
    asked = feed({4, 5})
    train(stopped)
    assert asked == list(range(5, 10))
    assert_same_run(small, Path(stopped.run_dir), rewound)

"""Checkpoints: what is saved comes back to the bit on any mesh, damage is noticed, and failed saves harm nothing."""

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from moejax.config import Checkpoint, Config, ConfigError, Data, Mesh, Model, MoE, Optimizer, Train
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train import checkpoint
from moejax.train.checkpoint import (
    Checkpoints,
    Damaged,
    Position,
    RunFailed,
    adding,
    checksums,
    read_manifest,
    restore_weights,
)
from moejax.train.optimizer import make_optimizer
from moejax.train.state import State, abstract, shardings, trained

CONFIG = Config(
    name="x", run_dir="x", data=Data(sequence=8, batch=8), optimizer=Optimizer(),
    model=Model(layers=4, d_model=8, heads=4, kv_heads=2, head_dim=2, vocab=264,
                moe=MoE(experts=4, active=2, hidden=8, router="sigmoid")))
MESHES = {
    "one": Mesh(), "ZeRO-1": Mesh(data=2, expert=2, tensor=2, zero1=True), "fsdp": Mesh(fsdp=4, tensor=2),
    "stages of 1 and 3": Mesh(data=2, pipeline=2, stage_layers=(1, 3)), "4 stages": Mesh(pipeline=4, tensor=2),
    "chunks": Mesh(pipeline=2, expert=2, chunks=2, schedule="interleaved")}


@pytest.fixture(scope="module", autouse=True)
def unheard():
    """Where a part of reading or writing fails Orbax drops the rest, and Python speaks of what nobody has awaited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda args: None)
        yield
        time.sleep(0.2)
        gc.collect()


# The checksum


def slow(x: np.ndarray) -> int:
    """The same in Python's numbers, entry by entry."""
    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    entries = enumerate(np.ascontiguousarray(x).reshape(-1))
    return sum(mix(int.from_bytes(one.tobytes(), "little") ^ mix(i + 1)) for i, one in entries) % 2**32


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random numbers that a weight may have, of either sign."""
    draws = np.random.default_rng(seed).normal(size=shape) * 40
    return draws > 0 if dtype == "bool" else np.abs(draws).astype(dtype) if "uint" in dtype else draws.astype(dtype)


DTYPES = ("float32", "int32", "bool", "bfloat16", "uint8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_is_the_slow_one_however_the_array_is_split(dtype):
    x = random_array(dtype, (8, 12, 4))
    expected = slow(x)
    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), ("a", "b"))
    specs = P(), P("a"), P("b", "a"), P(("a", "b")), P(("b", "a")), P(None, "b", "a"), P(None, None, "b")
    arrays = {str(spec): jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs}
    arrays["of no dimension"] = jax.device_put(x[0, 0, 0], NamedSharding(mesh, P()))
    sums = checksums(arrays)
    totals = np.asarray(adding(mesh)(sums))
    assert dict(zip(arrays, totals, strict=True)) == dict.fromkeys(map(str, specs), expected) | {
        "of no dimension": slow(x[0, 0, 0])}
    # every device has its part, and of copies one has all
    assert sums.shape == (len(arrays), 8) and np.count_nonzero(sums[0]) == 1 and np.count_nonzero(sums[4]) == 8


def of_each(arrays: list[np.ndarray]) -> np.ndarray:
    """The checksums of many arrays of one shape on one device."""
    one = jax.sharding.Mesh(jax.devices()[:1], "one")
    many = jax.vmap(lambda x: checkpoint.share(x, P(), one))
    return np.asarray(jax.jit(jax.shard_map(many, mesh=one, in_specs=P(), out_specs=P(), check_vma=False))(
        np.stack(arrays)))


def bits_of(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_checksum(dtype):
    """Of NaNs, infinities and both zeros too."""
    x = random_array(dtype, (3, 4))
    if "float" in dtype:
        x[0] = [np.nan, -np.inf, 0.0, -0.0]
    flipped = []
    for entry in range(x.size):
        for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
            flipped.append(x.copy())
            bits_of(flipped[-1]).reshape(-1)[entry] ^= bits_of(x).dtype.type(1 << bit)
    found = of_each([x, *flipped])
    assert len(found) == 1 + 12 * (1 if dtype == "bool" else 8 * x.dtype.itemsize)
    assert found[0] == slow(x) and found[0] not in found[1:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_in_another_order_or_at_zero_change_the_checksum(dtype):
    x = random_array(dtype, (6, 6), 1)
    harmed = [x.T.copy(), x[::-1].copy(), np.roll(x, 1)]
    for start in range(0, 36, 5):
        harmed.append(x.copy())
        harmed[-1].reshape(-1)[start:start + 4] = 0
    flat = x.reshape(-1)
    pairs = [(i, j) for i in range(36) for j in range(i) if flat[i].tobytes() != flat[j].tobytes()]
    assert len(pairs) > 200
    for i, j in pairs:
        harmed.append(x.copy())
        harmed[-1].reshape(-1)[[i, j]] = flat[[j, i]]
    harmed = [each for each in harmed if each.tobytes() != x.tobytes()]
    found = of_each([x, *harmed])
    assert found[0] == slow(x) and found[0] not in found[1:]


# Any mesh


@cache
def on(mesh: str, hidden: int = 8) -> Sharded:
    model = replace(CONFIG.model, moe=replace(CONFIG.model.moe, hidden=hidden))
    config = replace(CONFIG, mesh=MESHES[mesh], model=model)
    return Sharded(config, make_mesh(MESHES[mesh], jax.devices()[: MESHES[mesh].devices()]))


def optimizer_of(name: str):
    axes = {each: axes for each, axes in on("one").axes.items() if on("one").trainable[each]}
    return make_optimizer(replace(CONFIG.optimizer, name=name), 10, axes)


def layout(mesh: str, name: str = "adamw") -> State:
    return abstract(on(mesh), optimizer_of(name))


def random_like(tree, seed: int):
    """Every number of a tree of arrays at random, of the same kind."""
    random = np.random.default_rng(seed)

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return random.integers(1, 100, leaf.shape).astype(leaf.dtype)
        return random.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(one, tree)


def state_of(step: int, mesh: str = "one", name: str = "adamw") -> State:
    """Some state after `step` steps, no two numbers of it alike."""
    numbers = random_like(layout(mesh, name), step)._replace(step=np.int32(step))
    return jax.tree.map(jax.device_put, numbers, shardings(on(mesh), optimizer_of(name)))


def assert_same(got: State, expected: State, layout: State) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)

    def one(x, y, kind):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(kind.sharding, x.ndim)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(one, got, expected, layout)


def opened(run_dir: Path, say: Callable[[str], None] = lambda text: None, config: Config = CONFIG,
           **rules) -> closing[Checkpoints]:
    rules = {"every": 2} | rules
    return closing(Checkpoints(replace(config, run_dir=str(run_dir), checkpoint=Checkpoint(**rules)), say))


def save(run_dir: Path, *steps: int, mesh: str = "one", name: str = "adamw", **rules) -> None:
    with opened(run_dir, **rules) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step, mesh, name), Position(step, 3))


def steps_in(run_dir: Path) -> list[str]:
    return sorted((path.name for path in (run_dir / "checkpoints").iterdir()), key=lambda name: (len(name), name))


def manifest_file(step: Path) -> Path:
    (file,) = (step / "manifest").glob("*.json")
    return file


def manifest_of(run_dir: Path, step: int) -> dict:
    return read_manifest(checkpoint.folder_of(CONFIG.checkpoint, run_dir), step)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 2, 4)
    return folder


@pytest.fixture
def run(two, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("mesh", MESHES)
def test_onto_any_mesh_and_back(run, tmp_path, mesh):
    with opened(run) as checkpoints:
        state, position = checkpoints.restore(layout(mesh))
    assert position == Position(4, 3)
    assert_same(state, state_of(4), layout(mesh))
    with opened(tmp_path / "back") as checkpoints:
        checkpoints.save(state, position)
    # the names, shapes and checksums do not tell on how many devices it was
    assert manifest_of(tmp_path / "back", 4)["arrays"] == manifest_of(run, 4)["arrays"]
    with opened(tmp_path / "back") as checkpoints:
        state, position = checkpoints.restore(layout("one"))
    assert_same(state, state_of(4), layout("one"))


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers(tmp_path, name):
    save(tmp_path, 7, mesh="stages of 1 and 3", name=name)
    with opened(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(layout("one", name))
    assert_same(state, state_of(7, name=name), layout("one", name))


def test_the_manifest_has_the_checksum_of_every_array(two):
    manifest, state = manifest_of(two, 4), state_of(4)
    assert (manifest["step"], manifest["offset"], manifest["tokens"]) == (4, 3, 4 * 8 * 8)
    expected = {f"weights/{name}": value for name, value in state.weights.items()}
    expected |= {f"health/{name}": value for name, value in state.health._asdict().items()}
    moments = state.optimizer[0]
    expected |= {f"optimizer/0/mu/{name}": value for name, value in moments.mu.items()}
    expected |= {f"optimizer/0/nu/{name}": value for name, value in moments.nu.items()}
    assert expected.keys() <= manifest["arrays"].keys() and "step" not in manifest["arrays"]
    for name, value in expected.items():
        assert manifest["arrays"][name] == {
            "shape": list(value.shape), "dtype": str(value.dtype), "checksum": slow(np.asarray(value))}
    assert manifest["config"]["model"]["layers"] == 4


def test_what_the_next_step_overwrites_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        state = state_of(2)
        checkpoints.save(state, Position(2, 0))
        state = jax.block_until_ready(step(state))
    with opened(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(layout("one"))[0], state_of(2), layout("one"))


@pytest.mark.parametrize("mesh", ["one", "ZeRO-1"])
def test_weights_alone(tmp_path, mesh):
    """Whatever optimizer wrote them, and without touching what else is there."""
    save(tmp_path, 2, 4, name="muon")
    weights = restore_weights(tmp_path, on(mesh))
    expected = state_of(4, name="muon").weights
    assert set(weights) == set(expected) and any(not on(mesh).trainable[name] for name in weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, expected[name])
        assert value.sharding == on(mesh).shardings[name]
    assert steps_in(tmp_path) == ["2", "4"]


def test_no_checkpoint_to_take_weights_from(tmp_path):
    message = f"a run folder holds checkpoints; {tmp_path} has none; train it first"
    for _ in range(2):
        with pytest.raises(ConfigError) as error:
            restore_weights(tmp_path, on("one"))
        assert error.value.problems == [message]
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_weights_that_are_trained():
    weights = {name: name for name in on("one").shapes}
    left = set(weights) - set(trained(on("one"), weights))
    assert left == {name for name in weights if name.endswith("feed.bias")} != set()


# Which are kept


@pytest.mark.parametrize("rules, left", [
    ({"keep": 2}, ["8", "10"]), ({"keep": 1}, ["10"]), ({"keep": 1, "keep_every": 4}, ["4", "8", "10"])])
def test_so_many_are_kept(tmp_path, rules, left):
    save(tmp_path, 2, 4, 6, 8, 10, **rules)
    assert steps_in(tmp_path) == left


def test_another_folder(tmp_path):
    folder = str(tmp_path / "disk" / "mine")
    save(tmp_path / "run", 2, folder=folder)
    assert not (tmp_path / "run").exists() and (Path(folder) / "2").is_dir()
    with opened(tmp_path / "moved", folder=folder) as checkpoints:
        assert checkpoints.restore(layout("one"))[1] == Position(2, 3)
    sharded = Sharded(replace(CONFIG, checkpoint=Checkpoint(folder=folder)), on("one").mesh)
    np.testing.assert_array_equal(restore_weights(tmp_path / "run", sharded)["embedding"],
                                  state_of(2).weights["embedding"])


def test_what_a_save_left_half_done_does_not_count_and_goes(run):
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    with opened(run) as checkpoints:
        assert checkpoints.newest() == 4 and steps_in(run) == ["2", "4"]
        checkpoints.save(state_of(6), Position(6, 0))
    assert steps_in(run) == ["4", "6"]


def test_the_last_state_is_saved_once(run):
    said = []
    with opened(run, said.append) as checkpoints:
        checkpoints.restore(layout("one"))
        before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
        checkpoints.finish(state_of(4), Position(4, 3))
        assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
        checkpoints.finish(state_of(5), Position(5, 3))
        assert checkpoints.newest() == 5 and steps_in(run) == ["4", "5"]  # it is there when finish returns
    assert said == []


def test_a_run_without_checkpoints_has_none_to_go_on_from(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(layout("one")) is None and checkpoints.newest() is None


def test_back_to_a_step_puts_the_newer_ones_aside(run):
    said = []
    with opened(run, said.append) as checkpoints:
        assert checkpoints.restore(layout("one"), before=1) is None
        assert steps_in(run) == ["2", "4"] and said == []
        state, position = checkpoints.restore(layout("one"), before=3)
        assert position == Position(2, 3) and checkpoints.newest() == 2
        checkpoints.save(state_of(4, name="adamw")._replace(step=state.step + 2), Position(4, 5))
    (aside,) = (run / "checkpoints" / "aside").iterdir()
    assert aside.name.startswith("4-") and said == [f"the checkpoint of step 4 is kept as {aside}"]
    assert steps_in(run) == ["2", "4", "aside"] and manifest_of(run, 4)["offset"] == 5
    assert json.loads(manifest_file(aside).read_text())["of"].count('"offset": 3') == 1


def test_going_back_waits_for_the_save_in_the_background(tmp_path, monkeypatch):
    """One that is being written has no manifest yet, and is not damaged."""
    begun, said, make = threading.Event(), [], checkpoint.SaveManifest.make

    def slowly(manifest):
        begun.wait()
        return make(manifest)

    monkeypatch.setattr(checkpoint.SaveManifest, "make", slowly)
    with opened(tmp_path, said.append) as checkpoints:
        checkpoints.save(state_of(2), Position(2, 0))
        checkpoints.check(3)
        assert checkpoints.saving == 2  # the run goes on meanwhile
        threading.Timer(0.3, begun.set).start()
        state, position = checkpoints.restore(layout("one"))
    assert said == [] and position == Position(2, 0)
    assert_same(state, state_of(2), layout("one"))


# Damage


def largest(step: Path) -> Path:
    """The file with most of the arrays."""
    return max((path for path in step.glob("arrays/**/d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(step: Path) -> None:
    data = bytearray(largest(step).read_bytes())
    data[len(data) // 2] ^= 0x10
    largest(step).write_bytes(data)


def zero(step: Path) -> None:
    data = bytearray(largest(step).read_bytes())
    data[1024:1536] = bytes(512)
    largest(step).write_bytes(data)


def rewrite(change: Callable[[str], str]) -> Callable[[Path], None]:
    def harm(step: Path) -> None:
        old = manifest_file(step).read_text()
        manifest_file(step).write_text(change(old))
        assert manifest_file(step).read_text() != old
    return harm


def truncate(step: Path) -> None:
    largest(step).write_bytes(largest(step).read_bytes()[:2000])


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


UNREADABLE, EDITED = "its manifest cannot be read (", "its manifest is not as it was written"
DAMAGE = {
    "a flipped bit": (flip, "1 of its "), "a zeroed block": (zero, "1 of its "),
    "a file cut short": (truncate, "it cannot be read ("),
    "a file lost": (lambda step: largest(step).unlink(), "it cannot be read ("),
    "arrays lost": (lambda step: shutil.rmtree(step / "arrays"), "it cannot be read ("),
    "no manifest": (lambda step: manifest_file(step).unlink(), UNREADABLE + "FileNotFoundError)"),
    "half a manifest": (rewrite(lambda text: text[:len(text) // 2]), UNREADABLE + "JSONDecodeError)"),
    "an empty manifest": (rewrite(lambda text: ""), UNREADABLE + "JSONDecodeError)"),
    "a manifest of something else": (rewrite(lambda text: "[1]"), UNREADABLE + "TypeError)"),
    "an edited offset": (rewrite(lambda text: text.replace('\\"offset\\": 3', '\\"offset\\": 4')), EDITED),
    "an edited checksum": (rewrite(lambda text: text.replace('\\"checksum\\": 1', '\\"checksum\\": 2', 1)), EDITED),
    "an empty folder": (empty, UNREADABLE + "FileNotFoundError)")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_told_and_kept_aside_and_the_one_before_is_taken(run, kind):
    harm, what = DAMAGE[kind]
    harm(run / "checkpoints" / "4")
    harmed = {path.name: path.read_bytes() for path in (run / "checkpoints" / "4").rglob("*") if path.is_file()}
    said = []
    with opened(run, said.append) as checkpoints:
        state, position = checkpoints.restore(layout("one"))
        assert position == Position(2, 3) and checkpoints.newest() == 2
        checkpoints.save(state_of(4), Position(4, 0))  # it is not in the way
    assert_same(state, state_of(2), layout("one"))
    (aside,) = (run / "checkpoints" / "aside").iterdir()
    assert {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()} == harmed
    assert said[0].startswith(f"the checkpoint of step 4 in {run}/checkpoints is damaged: {what}")
    assert said[1:] == [f"the checkpoint of step 4 is kept as {aside}"] and aside.name.startswith("4-")
    assert steps_in(run) == ["2", "4", "aside"]


def test_several_processes_write_a_manifest_each(run):
    """With the checksums of their own shards, whose sum counts."""
    file, said = manifest_file(run / "checkpoints" / "4"), []
    made = json.loads(json.loads(file.read_text())["of"])
    parts = [made | {"processes": 2, "arrays": {name: dict(one) for name, one in made["arrays"].items()}}
             for _ in range(2)]
    for i, (name, one) in enumerate(made["arrays"].items()):
        parts[1]["arrays"][name]["checksum"] = i * 123456789 % 2**32
        parts[0]["arrays"][name]["checksum"] = (one["checksum"] - i * 123456789) % 2**32

    def write(process: int, part: dict) -> Path:
        text, place = json.dumps(part), file.with_name(checkpoint.FILE.format(process))
        place.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "of": text}))
        return place

    _, second = write(0, parts[0]), write(1, parts[1])
    with opened(run, said.append) as checkpoints:
        assert checkpoints.restore(layout("one"))[1] == Position(4, 3) and said == []
    assert manifest_of(run, 4)["arrays"] == made["arrays"]
    first = next(iter(made["arrays"]))
    for harm, what in ((lambda: second.unlink(), UNREADABLE), (lambda: write(1, parts[1] | {"step": 2}), EDITED),
                       (lambda: write(1, parts[0]), "not as they were saved")):
        harm()
        with pytest.raises(Damaged, match=re.escape(what)):
            checkpoint.read(checkpoint.open_manager(checkpoint.folder_of(CONFIG.checkpoint, run), None), 4, {
                first: jax.ShapeDtypeStruct(tuple(made["arrays"][first]["shape"]), made["arrays"][first]["dtype"],
                                            sharding=NamedSharding(on("one").mesh, P()))})


def test_the_array_that_is_damaged_is_named(run):
    flip(run / "checkpoints" / "4")
    said = []
    with opened(run, said.append) as checkpoints:
        checkpoints.restore(layout("one"))
    count = len(manifest_of(run, 2)["arrays"])
    named = said[0].removeprefix(f"the checkpoint of step 4 in {run}/checkpoints is damaged: 1 of its {count} arrays "
                                 "are not as they were saved, first ")
    assert named in manifest_of(run, 2)["arrays"]


def test_damaged_weights_are_not_used_and_left_where_they_are(run):
    shutil.rmtree(run / "checkpoints" / "4" / "arrays")
    said = []
    weights = restore_weights(run, on("one"), said.append)
    np.testing.assert_array_equal(weights["embedding"], state_of(2).weights["embedding"])
    assert len(said) == 1 and "step 4" in said[0] and steps_in(run) == ["2", "4"]


def test_all_damaged(run):
    shutil.rmtree(run / "checkpoints" / "2" / "manifest")
    shutil.rmtree(run / "checkpoints" / "4" / "arrays")
    said = []
    with opened(run, said.append) as checkpoints, pytest.raises(ConfigError) as error:
        checkpoints.restore(layout("one"))
    assert error.value.problems == [
        f"a run goes on from a good checkpoint; all in {run}/checkpoints are damaged (steps 2, 4); bring one back from "
        "a copy, or set run_dir to a new folder"]
    assert [line.split(" in ")[0] for line in said] == ["the checkpoint of step 4", "the checkpoint of step 2"]
    assert steps_in(run) == ["2", "4"]
    with pytest.raises(ConfigError, match=r"all in .* are damaged \(steps 2, 4\)"):
        restore_weights(run, on("one"), said.append)


def test_another_model_is_no_damage(run):
    """Its checkpoints stay where they are."""
    other = on("one", hidden=16)
    with opened(run) as checkpoints, pytest.raises(ConfigError) as error:
        checkpoints.restore(abstract(other, optimizer_of("adamw")))
    (problem,) = error.value.problems
    assert problem.startswith("a checkpoint is read by the model that wrote it; step 4 in "
                              f"{run}/checkpoints is of another: weights/runs.0.0.feed.")
    assert "((4, 4, 8, 8), 'float32') there and ((4, 4, 16, 8), 'float32') here" in problem
    assert problem.endswith(" …; undo the change of the config") and steps_in(run) == ["2", "4"]
    with pytest.raises(ConfigError) as error:
        with opened(run) as checkpoints:
            checkpoints.restore(layout("one", "muon"))
    assert " is missing there and " in error.value.problems[0]
    with pytest.raises(ConfigError, match="is of another: weights/runs"):
        restore_weights(run, other)


def test_other_random_numbers(run):
    for here in (jax.threefry_partitionable(False), jax.default_prng_impl("rbg")):
        with here, opened(run) as checkpoints, pytest.raises(ConfigError) as error:
            checkpoints.restore(layout("one"))
        assert error.value.problems[0].startswith(
            "a run draws the same random numbers to its end; it began with {'impl': 'threefry2x32', 'partitionable': "
            "True, 'seed': 0}, and this process has {")
    other = replace(CONFIG, train=Train(seed=1))
    with opened(run, config=other) as checkpoints, pytest.raises(ConfigError, match=r"'seed': 0.* has .*'seed': 1"):
        checkpoints.restore(layout("one"))
    flip(run / "checkpoints" / "4")
    with opened(run, config=other) as checkpoints, pytest.raises(ConfigError, match="the same random numbers"):
        checkpoints.restore(layout("one"))
    assert steps_in(run) == ["2", "4"]  # what is refused changes nothing


# Saves that fail


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    file = disk / "rest"
    with file.open("wb", buffering=0) as rest:
        try:
            while rest.write(bytes(4096)):
                pass
        except OSError:
            return file


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk(small_disk, tmp_path, keep):
    said, folder = [], small_disk / "checkpoints"
    with opened(tmp_path, said.append, folder=str(folder), every=100, keep=keep) as checkpoints:
        checkpoints.save(state_of(2), Position(2, 0))
        checkpoints.settle()
        rest = fill(small_disk)
        for step in (4, 5):
            assert checkpoints.due(step) == (step == 5)
            checkpoints.save(state_of(step), Position(step, 0))
            for _ in range(1000):
                checkpoints.check(step)
                if checkpoints.saving is None:
                    break
                time.sleep(0.01)
            assert said[-1].startswith(f"the checkpoint of step {step} could not be saved (")
            assert said[-1].endswith("; the last good one is of step 2; trying again") and checkpoints.newest() == 2
        assert len(said) == 2 and "No space left" in said[0]
        with opened(tmp_path, folder=str(folder), keep=keep) as others:
            assert_same(others.restore(layout("one"))[0], state_of(2), layout("one"))
        time.sleep(0.5)  # threads of the failed saves go on for a moment
        rest.unlink()
        assert [checkpoints.due(step) for step in (6, 7, 8)] == [False, True, True]  # after 1 step, then 2
        checkpoints.save(state_of(7), Position(7, 0))
        checkpoints.settle()
        assert not checkpoints.due(8)
    assert len(said) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["2", "7"][-keep:]
    with opened(tmp_path, folder=str(folder), keep=keep) as checkpoints:
        assert checkpoints.restore(layout("one"))[1] == Position(7, 0)


def test_a_folder_that_cannot_be_written_for_a_while(run):
    """A file is in the place of the folder, as root may write anywhere."""
    said, folder = [], run / "checkpoints"
    with opened(run, said.append) as checkpoints:
        folder.rename(run / "away")
        folder.write_text("in the way")
        checkpoints.save(state_of(6), Position(6, 0))
        for step in (7, 8):
            checkpoints.check(step)
        assert said and all("could not be saved" in line for line in said)
        folder.unlink()
        (run / "away").rename(folder)
        checkpoints.save(state_of(8), Position(8, 0))
    assert steps_in(run) == ["4", "8"] and len(said) == 1


def broken(*args, **kwargs):
    raise OSError(28, "No space left on device\nand more")


def test_a_failure_is_told_and_tried_again_ever_more_seldom(run, monkeypatch):
    said = []
    with opened(run, said.append, every=5) as checkpoints:
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", broken)
        tried = []
        for step in range(6, 31):
            if checkpoints.due(step):
                tried.append(step)
                checkpoints.save(state_of(4), Position(step, 0))
            checkpoints.check(step)
        # 1, 2 and 4 steps after a failure, then every 5, and always at a multiple of 5
        assert tried == [10, 11, 13, 15, 20, 25, 30]
        monkeypatch.undo()
        assert checkpoints.newest() == 4 and steps_in(run) == ["2", "4"]
        checkpoints.save(state_of(35), Position(35, 0))
        checkpoints.settle()
        assert checkpoints.newest() == 35 and not checkpoints.due(36)
    assert said == [f"the checkpoint of step {step} could not be saved ([Errno 28] No space left on device); "
                    "the last good one is of step 4; trying again" for step in tried]


def test_a_failure_in_the_background_is_told_by_the_step_that_notices(run, monkeypatch):
    said = []
    with opened(run, said.append) as checkpoints:
        monkeypatch.setattr(checkpoint.SaveManifest, "make", broken)
        checkpoints.save(state_of(6), Position(6, 0))
        monkeypatch.undo()
        for _ in range(1000):
            checkpoints.check(7)
            if said:
                break
            time.sleep(0.01)
        assert said == ["the checkpoint of step 6 could not be saved ([Errno 28] No space left on device); the last "
                        "good one is of step 4; trying again"]
        assert steps_in(run) == ["2", "4"] and not checkpoints.due(7) and checkpoints.due(8)


def test_a_folder_that_cannot_even_be_looked_at_for_a_while(run, monkeypatch):
    said = []
    with opened(run, said.append) as checkpoints:
        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", broken)
        monkeypatch.setattr(checkpoint, "open_manager", broken)
        for step in (6, 7):
            checkpoints.save(state_of(step), Position(step, 0))
        monkeypatch.undo()
        assert checkpoints.due(9)
        checkpoints.save(state_of(9), Position(9, 0))
    assert [line.split(" could")[0] for line in said] == ["the checkpoint of step 6", "the checkpoint of step 7"]
    assert steps_in(run) == ["4", "9"]


def test_a_failure_at_the_end_is_told_once(run, monkeypatch):
    """As when the run ends for another reason, which must not be hidden."""
    said = []
    monkeypatch.setattr(checkpoint.SaveManifest, "make", broken)
    with pytest.raises(ZeroDivisionError), opened(run, said.append) as checkpoints:
        checkpoints.save(state_of(6), Position(6, 0))
        raise ZeroDivisionError
    assert said == ["the last checkpoint could not be saved ([Errno 28] No space left on device)"]
    assert steps_in(run)[:2] == ["2", "4"] and "6" not in steps_in(run)


def test_the_last_state_is_worth_several_attempts(run, monkeypatch):
    said, pauses, right = [], [], checkpoint.ocp.CheckpointManager.save

    def third_time(self, *args, **kwargs):
        return right(self, *args, **kwargs) if len(pauses) > 2 else broken()

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", third_time)
    with opened(run, said.append) as checkpoints:
        checkpoints.finish(state_of(6), Position(6, 0))
    assert pauses == [0, 1, 5] and len(said) == 2 and steps_in(run) == ["4", "6"]


def test_a_last_state_that_cannot_be_saved(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", broken)
    said = []
    with opened(run, said.append) as checkpoints, pytest.raises(RunFailed) as error:
        checkpoints.finish(state_of(6), Position(6, 0))
    assert str(error.value) == (
        "the checkpoint of step 6, the last, could not be saved; the last good one is of step 4; make room in "
        f"{run}/checkpoints and start the run again")
    assert len(said) == 3 and steps_in(run) == ["2", "4"]


def test_processes_that_could_not_go_on_together_end(run, monkeypatch):
    with opened(run) as checkpoints:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(RunFailed) as error:
            checkpoints.failed(OSError("no"), 6)
        monkeypatch.undo()
    assert str(error.value) == "the checkpoint of step 6 could not be saved (no); the last good one is of step 4"

"""Checkpoints: what is saved comes back to the bit, on the same mesh or another, and no more is kept than asked for."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import Config, ConfigError, Data, Mesh, Model, MoE, Optimizer
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train.checkpoint import Checkpoints, restore_weights
from moejax.train.optimizer import OPTIMIZERS, make_optimizer
from moejax.train.state import State, abstract, shardings, trained

CONFIG = Config(
    name="x", run_dir="x", data=Data(sequence=8, batch=8), optimizer=Optimizer(),
    model=Model(layers=2, pattern="DM", d_model=8, heads=4, kv_heads=2, head_dim=2, hidden=8, vocab=264,
                moe=MoE(experts=4, active=2, hidden=8, router="sigmoid")))
MESHES = {"one": Mesh(), "ZeRO-1": Mesh(data=2, expert=2, tensor=2, zero1=True), "fsdp": Mesh(fsdp=4, tensor=2)}


@cache
def on(mesh: str) -> Sharded:
    return Sharded(CONFIG, make_mesh(MESHES[mesh], jax.devices()[: MESHES[mesh].devices()]))


def optimizer_of(name: str):
    axes = {each: axes for each, axes in on("one").axes.items() if on("one").trainable[each]}
    return make_optimizer(replace(CONFIG.optimizer, name=name), 10, axes)


def random_like(tree, seed: int):
    """Every number of a tree of arrays at random, of the same kind."""
    random = np.random.default_rng(seed)

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return random.integers(1, 100, leaf.shape).astype(leaf.dtype)
        return random.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(one, tree)


def state_of(mesh: str, optimizer, step: int) -> State:
    """Some state after `step` steps, no two numbers of it alike."""
    made = random_like(abstract(on(mesh), optimizer), step)._replace(step=np.int32(step))
    return jax.tree.map(jax.device_put, made, shardings(on(mesh), optimizer))


def assert_same(got: State, expected: State, places: State) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)

    def one(x, y, place):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(place, x.ndim)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(one, got, expected, places)


def save(folder: Path, *steps: int, keep: int = 2, mesh: str = "one", name: str = "adamw") -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state_of(mesh, optimizer_of(name), step))
    checkpoints.close()


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("name, saved, restored", [
    *[(name, "one", "one") for name in OPTIMIZERS], *[(name, "ZeRO-1", "fsdp") for name in OPTIMIZERS],
    ("adamw", "fsdp", "one"), ("adamw", "one", "ZeRO-1")])
def test_what_is_saved_comes_back(tmp_path, name, saved, restored):
    optimizer = optimizer_of(name)
    save(tmp_path, 7, mesh=saved, name=name)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 7
    places = shardings(on(restored), optimizer)
    state = checkpoints.restore(abstract(on(restored), optimizer), places)
    checkpoints.close()
    assert_same(state, state_of("one", optimizer, 7), places)


def test_so_many_are_kept_and_the_newest_is_restored(tmp_path):
    save(tmp_path, 2, 4, 6, 8)
    assert steps_in(tmp_path) == ["6", "8"]
    save(tmp_path, 10, keep=3)
    assert steps_in(tmp_path) == ["10", "6", "8"]
    checkpoints, optimizer = Checkpoints(tmp_path, 3), optimizer_of("adamw")
    assert checkpoints.latest() == 10
    places = shardings(on("one"), optimizer)
    state = checkpoints.restore(abstract(on("one"), optimizer), places)
    checkpoints.close()
    assert_same(state, state_of("one", optimizer, 10), places)


def test_a_step_that_is_kept_already_is_left_as_it_is(tmp_path):
    save(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    save(tmp_path, 4)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == before


def test_one_that_was_not_finished_does_not_count(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 4
    checkpoints.close()
    save(tmp_path, 6)  # and is not in the way of the same step
    assert restore_weights(tmp_path, on("one"))["norm.scale"][0] == state_of("one", optimizer_of("adamw"), 6).weights[
        "norm.scale"][0]


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_alone(tmp_path, mesh):
    """Whatever optimizer wrote them, and without touching what else is there."""
    save(tmp_path, 2, 4, keep=2, mesh="ZeRO-1", name="muon")
    weights = restore_weights(tmp_path, on(mesh))
    expected = state_of("one", optimizer_of("muon"), 4).weights
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

"""Checkpoints of a run, by Orbax: weights, optimizer state and step, independent of the mesh that wrote them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from moejax import config as configs
from moejax.model.sharded import Sharded
from moejax.train.state import State


class Checkpoints:
    """The checkpoints under `run_dir`/checkpoints; saving goes on in the background while the run continues."""

    def __init__(self, run_dir: Path, keep: int = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager((run_dir / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self.manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Keep the state after `step` steps.  Does nothing where that step is kept already."""
        if step != self.latest():
            self.manager.save(step, args=ocp.args.Composite(
                weights=ocp.args.StandardSave(state.weights), optimizer=ocp.args.StandardSave(state.optimizer)))

    def restore(self, abstract: State, place: State) -> State:
        """The newest state, placed by `place`."""
        step = self.latest()
        parts = jax.tree.map(target, abstract._replace(step=()), place._replace(step=()))
        found = self.manager.restore(step, args=ocp.args.Composite(
            weights=ocp.args.StandardRestore(parts.weights), optimizer=ocp.args.StandardRestore(parts.optimizer)))
        return State(jax.device_put(jnp.int32(step), place.step), found["weights"], found["optimizer"])

    def close(self) -> None:
        """Wait for what is being saved; errors of a save in the background come out here."""
        self.manager.wait_until_finished()
        self.manager.close()


def target(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore_weights(run_dir: Path, sharded: Sharded) -> dict[str, Any]:
    """The newest weights of a run, on any mesh.

    Raises:
        ConfigError: the run has no complete checkpoint.
    """
    found = Checkpoints(run_dir) if (run_dir / "checkpoints").is_dir() else None
    if found is None or found.latest() is None:
        raise configs.ConfigError([f"a run folder holds checkpoints; {run_dir} has none; train it first"])
    parts = {name: jax.ShapeDtypeStruct(sharded.shapes[name], jnp.float32, sharding=place)
             for name, place in sharded.shardings.items()}
    weights = found.manager.restore(found.latest(), args=ocp.args.Composite(
        weights=ocp.args.StandardRestore(parts)))["weights"]
    found.close()
    return weights

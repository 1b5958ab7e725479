"""What a run is at one moment, and where each array of it lies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, NamedSharding, P

from moejax.model.sharded import Sharded
from moejax.parallel.axes import further
from moejax.train.fault import Health


class State(NamedTuple):
    step: Array  # steps done, int32
    weights: dict[str, Array]  # with the balancing biases
    optimizer: Any
    health: Health


def optimizer_specs(sharded: Sharded) -> dict[str, P]:
    """Placement of optimizer state and of gradients by weight: with ZeRO-1 (arXiv 1910.02054) over `data` as well."""
    split = sharded.mesh.shape["data"] if sharded.config.mesh.zero1 else 1
    return {name: further(spec, sharded.shapes[name], "data", split) for name, spec in sharded.specs.items()}


def trained(sharded: Sharded, weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if sharded.trainable[name]}


def abstract(sharded: Sharded, optimizer: optax.GradientTransformation) -> State:
    """Shape, type and NamedSharding of every array of the state."""
    moments = optimizer_specs(sharded)

    def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        specs = sharded.specs if path[0].name == "weights" else moments
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
        # Factored statistics have fewer dimensions than their weight; they are small and lie everywhere.
        spec = specs[names[-1]] if names and leaf.shape == sharded.shapes[names[-1]] else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(sharded.mesh, spec))

    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sharded.shapes.items()}
    state = State(jax.ShapeDtypeStruct((), jnp.int32), weights,
                  jax.eval_shape(optimizer.init, trained(sharded, weights)), jax.eval_shape(Health.fresh))
    return jax.tree_util.tree_map_with_path(placed, state)


def shardings(sharded: Sharded, optimizer: optax.GradientTransformation) -> State:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(sharded, optimizer))


def fresh(sharded: Sharded, optimizer: optax.GradientTransformation, weights: dict[str, Array] | None = None) -> State:
    """The state before the first step: the config's initial weights, or those given."""
    weights = weights or sharded.init(sharded.config.train.seed)
    rest = jax.jit(lambda weights: State(jnp.zeros((), jnp.int32), {}, optimizer.init(weights), Health.fresh()),
                   out_shardings=shardings(sharded, optimizer)._replace(weights={}))
    return rest(trained(sharded, weights))._replace(weights=weights)

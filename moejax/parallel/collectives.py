"""Every byte that moves between devices moves by one of these verbs.

They run inside one `jax.shard_map` over all mesh axes, where JAX knows which values differ between the devices of an
axis ("vary") and transposes each verb rightly.  Nothing varies over an axis of length 1: there a verb does nothing.

| verb        | axis     | forward                                 | backward               |
| ----------- | -------- | --------------------------------------- | ---------------------- |
| gather      | fsdp     | all_gather of a weight shard            | psum_scatter           |
| enter       | tensor   | nothing, or all_gather of the sequence  | psum, or psum_scatter  |
| leave       | tensor   | psum, or psum_scatter over the sequence | nothing, or all_gather |
| exchange    | expert   | all_to_all                              | all_to_all             |
| collect     | expert   | all_gather of tokens                    | psum_scatter           |
| deliver     | expert   | psum_scatter of results                 | all_gather             |
| to_stages   | pipeline | all_to_all of weights                   | all_to_all             |
| from_stages | pipeline | all_gather of weights                   | psum_scatter           |
| pass_on     | pipeline | ppermute to the next stage              | (called with step -1)  |
| total       | any      | psum                                    | nothing                |
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from moejax.parallel.axes import BATCH


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """The same values, typed as differing over `axes`; its transpose is the psum over them."""
    return jax.tree.map(lambda x: lax.pcast(x, need, to="varying") if (
        need := tuple(axis for axis in axes if axis not in varying(x) and lax.axis_size(axis) > 1)) else x, tree)


def varying(x: Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """The mesh axes over which the value may differ between devices."""
    return (x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)).manual_axis_type.varying


def match(tree: Any, *others: Array) -> Any:
    """`tree` typed to vary wherever any of `others` does, as the carry of a scan must be from the start."""
    return vary(tree, tuple(sorted(frozenset().union(*(varying(x) for x in others)))))


def zeros(kind: Any) -> Any:
    """Zeros of the shapes, types and varying axes that `jax.eval_shape` found."""
    return jax.tree.map(lambda one: vary(jnp.zeros(one.shape, one.dtype), tuple(varying(one))), kind)


def cast(tree: Any, kind: Any) -> Any:
    """The same values, typed as varying over the axes of `kind`, which has the structure of the tree."""
    return jax.tree.map(lambda x, one: vary(x, tuple(varying(one))), tree, kind)


def only_if(condition: Array, function: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """function(*args), or where the condition is false otherwise(*args, the type of function's result), not computing
    the other.  Devices that share a collective inside must agree on the condition.
    """
    traced, kind = jax.make_jaxpr(function, return_shape=True)(*args)  # once: functions are large, and nest
    kind = jax.eval_shape(lambda kind: vary(kind, tuple(varying(condition))), kind)

    def run(*args: Any) -> Any:
        found = map(jnp.asarray, core.jaxpr_as_fun(traced)(*jax.tree.leaves(args)))  # literals come as they are
        return cast(jax.tree.unflatten(jax.tree.structure(kind), found), kind)

    return lax.cond(condition, run, lambda *args: cast(otherwise(*args, kind), kind), *args)


def index(axis: str) -> Array | int:
    return lax.axis_index(axis) if lax.axis_size(axis) > 1 else 0


def gather(x: Array, dim: int) -> Array:
    return lax.all_gather(x, "fsdp", axis=dim, tiled=True) if lax.axis_size("fsdp") > 1 else x


def enter(x: Array, sequence: bool) -> Array:
    """[B T D] before work that is split over `tensor`; with `sequence`, x holds a slice of T until here."""
    if sequence and lax.axis_size("tensor") > 1:
        return lax.all_gather(x, "tensor", axis=1, tiled=True)
    return vary(x, ("tensor",))


def leave(x: Array, sequence: bool) -> Array:
    """The sum of the partial products [B T D] of all tensor shards; with `sequence`, this shard's slice of T."""
    if sequence and lax.axis_size("tensor") > 1:
        return lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)
    return total(x, ("tensor",))


def exchange(x: Array, split: int, concat: int) -> Array:
    return lax.all_to_all(x, "expert", split, concat, tiled=True) if lax.axis_size("expert") > 1 else x


def collect(x: Array) -> Array:
    return lax.all_gather(x, "expert", axis=0, tiled=True) if lax.axis_size("expert") > 1 else x


def deliver(x: Array) -> Array:
    return lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True) if lax.axis_size("expert") > 1 else x


def to_stages(x: Array, dim: int) -> Array:
    """[stages · n, …], of which every stage holds a slice along `dim`, to this stage's own n entries, whole."""
    return lax.all_to_all(x, "pipeline", 0, dim, tiled=True)


def from_stages(x: Array, dim: int) -> Array:
    """The slices of all stages along `dim`, joined."""
    return lax.all_gather(x, "pipeline", axis=dim, tiled=True)


def pass_on(x: Array, step: int) -> Array:
    """What the stage before (step 1) or after (step -1) had, around the ring."""
    count = lax.axis_size("pipeline")
    return lax.ppermute(x, "pipeline", [(i, (i + step) % count) for i in range(count)])


def after(tree: Any, *others: Any) -> Any:
    """The same values, not before `others` are there: on a CPU independent collectives can block each other."""
    if jax.default_backend() != "cpu":
        return tree
    never = sum(jnp.sum(x.ravel()[:1] > jnp.inf) for x in jax.tree.leaves(others))  # 0, which the compiler cannot know
    return jax.tree.map(lambda x: x + never.astype(x.dtype), tree)


def reduced(verb: Callable[..., Array], tree: Any, axes: tuple[str, ...]) -> Any:
    """What a verb of lax makes of each value, over those among `axes` on which it varies."""
    return jax.tree.map(
        lambda x: verb(x, over) if (over := tuple(axis for axis in axes if axis in varying(x))) else x, tree)


def total(tree: Any, axes: tuple[str, ...]) -> Any:
    return reduced(lax.psum, tree, axes)


def mean(tree: Any) -> Any:
    return reduced(lax.pmean, tree, (*BATCH, "tensor"))


def once(x: Array) -> Array:
    """What all tensor shards have alike, on the first and zeros on the others: a part of a sum over `tensor`."""
    return jnp.where(lax.axis_index("tensor") == 0, x, 0) if lax.axis_size("tensor") > 1 else x


def agree(tree: Any) -> Any:
    """Values that all tensor shards computed alike, typed as equal; a gradient then counts once."""
    return reduced(lax.pmean, tree, ("tensor",))


def everywhere(x: Array, dim: int) -> Array:
    """The shards of `tensor` joined along `dim`, known to be the same on all of them."""
    return lax.all_gather(x, "tensor", axis=dim, tiled=True, to="invarying") if "tensor" in varying(x) else x


def highest(x: Array) -> Array:
    """The largest of the tensor shards' values; not differentiable."""
    return lax.pmax(lax.stop_gradient(x), "tensor") if "tensor" in varying(x) else x

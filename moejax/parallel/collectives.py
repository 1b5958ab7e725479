"""Every byte that moves between devices moves by one of these verbs.

They run inside one `jax.shard_map` that is manual over all mesh axes with `check_vma=True`, so that JAX knows
which values differ between the devices of an axis ("vary") and transposes each verb rightly.  Nothing varies over an
axis of length 1, and a verb does nothing there.

| verb     | axis            | forward                                     | backward                       |
|----------|-----------------|---------------------------------------------|--------------------------------|
| gather   | fsdp            | all_gather of a weight shard                | psum_scatter                   |
| enter    | tensor          | nothing, or all_gather of the sequence      | psum, or psum_scatter          |
| leave    | tensor          | psum, or psum_scatter over the sequence     | nothing, or all_gather         |
| exchange | expert          | all_to_all                                  | all_to_all                     |
| collect  | expert          | all_gather of tokens                        | psum_scatter                   |
| deliver  | expert          | psum_scatter of results                     | all_gather                     |
| total    | any             | psum                                        | nothing                        |
"""

from typing import Any

import jax
from jax import Array, lax

from moejax.parallel.axes import BATCH


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """The same values, typed as differing over `axes`; its transpose is the psum over them."""

    def one(x: Array) -> Array:
        need = tuple(axis for axis in axes if axis not in varying(x) and lax.axis_size(axis) > 1)
        return lax.pcast(x, need, to="varying") if need else x

    return jax.tree.map(one, tree)


def varying(x: Array) -> frozenset[str]:
    """The mesh axes over which the value may differ between devices."""
    return jax.typeof(x).manual_axis_type.varying


def match(tree: Any, *others: Array) -> Any:
    """`tree` typed to vary wherever any of `others` does, as the carry of a scan must be from the start."""
    return vary(tree, tuple(sorted(frozenset().union(*(varying(x) for x in others)))))


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
    if lax.axis_size("expert") == 1:
        return x
    return lax.all_to_all(x, "expert", split, concat, tiled=True)


def collect(x: Array) -> Array:
    return lax.all_gather(x, "expert", axis=0, tiled=True) if lax.axis_size("expert") > 1 else x


def deliver(x: Array) -> Array:
    if lax.axis_size("expert") == 1:
        return x
    return lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True)


def total(tree: Any, axes: tuple[str, ...]) -> Any:
    """The sum over `axes`, of each value over those among them on which it varies."""

    def one(x: Array) -> Array:
        over = tuple(axis for axis in axes if axis in varying(x))
        return lax.psum(x, over) if over else x

    return jax.tree.map(one, tree)


def mean(tree: Any) -> Any:
    """The mean over the batch axes and over `tensor`, of each value over those on which it varies."""

    def one(x: Array) -> Array:
        over = tuple(axis for axis in (*BATCH, "tensor") if axis in varying(x))
        return lax.pmean(x, over) if over else x

    return jax.tree.map(one, tree)


def agree(tree: Any) -> Any:
    """Values that all tensor shards computed alike, typed as equal; a gradient then counts once."""
    return jax.tree.map(lambda x: lax.pmean(x, "tensor") if "tensor" in varying(x) else x, tree)


def everywhere(x: Array, dim: int) -> Array:
    """The shards of `tensor` joined along `dim`, known to be the same on all of them."""
    return lax.all_gather(x, "tensor", axis=dim, tiled=True, to="invarying") if "tensor" in varying(x) else x


def highest(x: Array) -> Array:
    """The largest of the tensor shards' values; not differentiable."""
    return lax.pmax(lax.stop_gradient(x), "tensor") if "tensor" in varying(x) else x

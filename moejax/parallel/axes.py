"""The one table from the logical axes of weights, as in "layer expert: embed -> gate hidden" (see model/weights.py), to
the axes of the mesh.  Everything that depends on the layout of a weight reads it.
"""

from collections.abc import Mapping

from jax import P

BATCH = ("data", "fsdp", "expert")  # the batch is split over these three together

RULES: dict[str, str | None] = {
    "layer": "pipeline",
    "vocab": "tensor",
    "embed": "fsdp",  # gathered before use
    "heads": "tensor",
    "kv": "tensor",  # unless there are fewer KV heads than shards: then every shard holds all of them
    "hidden": "tensor",
    "expert": "expert",
    # Whole everywhere.  "choice" is the router's output: every device decides alike.  The second line is of latent
    # attention, the third of images: "place" of a patch in its image, and of a frame in its video.
    **dict.fromkeys(("head", "gate", "choice", "norm", "one",
                     "queries", "keys", "mixed", "both",
                     "colour", "row", "column", "place", "latent", "three")),
}


def names(axes: str) -> tuple[str, ...]:
    """The logical axis of every dimension, in order."""
    return tuple(axes.replace(":", " ").replace("->", " ").split())


def spec(axes: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> P:
    """How a weight lies on a mesh of these lengths.  Raises ValueError: a dimension does not divide; states both."""
    placed = []
    for name, size in zip(names(axes), shape, strict=True):
        axis = RULES[name] if mesh.get(RULES[name] or "", 1) > 1 else None
        if name == "kv" and axis and size < mesh[axis]:
            axis = None
        if axis and size % mesh[axis]:
            raise ValueError(f"axis {name} of {axes!r} has {size} entries, which {axis} {mesh[axis]} does not divide")
        placed.append(axis)
    return P(*placed)


def rows(mesh: Mapping[str, int]) -> P:
    """Of anything whose first dimension is the batch."""
    return P(tuple(axis for axis in BATCH if mesh[axis] > 1) or None)


def further(place: P, shape: tuple[int, ...], axis: str, size: int, first: int = 0) -> P:
    """The first free dimension that divides, from `first` on, is split over `axis` as well."""
    if size == 1:
        return place
    for dim, (taken, length) in enumerate(zip(place, shape, strict=True)):
        if dim >= first and taken is None and length % size == 0:
            return P(*place[:dim], axis, *place[dim + 1:])
    return place


def missing(place: P, over: tuple[str, ...] = (*BATCH, "pipeline")) -> tuple[str, ...]:
    """The axes among `over` that do not split a weight placed so: its gradient is summed over them."""
    return tuple(axis for axis in over if axis not in place)

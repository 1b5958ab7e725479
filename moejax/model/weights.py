"""Weights, and the one legend of letters and axes for the whole package.

Letters in shapes: B sequences, T tokens of a sequence, S key positions, D d_model, N query heads, K KV heads,
G query heads per KV head, H head_dim, J entries of a value, F hidden width, U gate (1 matrix into the hidden layer,
or 2), V vocabulary, E experts, A active experts of a token, R routing groups, M tokens of a routing group, C capacity
(seats of an expert in a group), Q seats of a dispatch, L layers, X D or one more, I images of a sequence, W width of
the image encoder, P its patches and class token, O vectors of an image that text can look at; t is T, or this tensor
shard's slice of it between blocks.  Inside the model all are the sizes on one device.

One string says all about a weight: `w("expert: embed -> gate hidden")` has batch axes before the colon, the axes
it sums over before the arrow (their product is the init fan-in) and its output axes after it.  A weight without an
arrow is a vector: it starts at a constant, or, of tables that sum over nothing, like an embedding, and does not decay.
Sizes come from the config, placement from parallel/axes.py.  A layer starts the same whatever it is stacked with.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax import config as configs
from moejax.parallel import axes as rules, collectives

LAYERS = 2**31  # names the random numbers of layers; those of other weights are counted from 0


class Bias(nnx.Variable):
    """A balancing bias: moved by the load of the experts, not by a gradient."""


class Weights:
    """Makes the weights of one model: `w(axes)` returns a float32 `nnx.Param` that remembers its axes."""

    def __init__(self, model: configs.Model, key: Array, stack: Sequence[int] | None = None,
                 sizes: dict[str, int] | None = None):
        self.model, self.stack, self.key = model, stack, key
        self.rngs = nnx.Rngs(key)
        self.sizes = sizes or {
            "embed": model.d_model, "norm": model.d_model, "heads": model.heads, "kv": model.kv_heads,
            "head": model.head_dim, "hidden": model.hidden, "vocab": model.vocab, "one": 1,
            "gate": 2 if "glu" in model.activation else 1, "expert": model.moe.experts, "choice": model.moe.experts}

    def layers(self, numbers: Sequence[int]) -> "Weights":
        """The same, for layers of these numbers stacked along a first axis."""
        return Weights(self.model, jax.random.fold_in(self.key, LAYERS), numbers, self.sizes)

    def sized(self, **sizes: int) -> "Weights":
        return Weights(self.model, self.rngs.params(), self.stack, self.sizes | sizes)

    def __call__(self, axes: str, constant: float | None = None, kind: type[nnx.Variable] = nnx.Param) -> Any:
        shape = tuple(self.sizes[name] for name in rules.names(axes))
        stacked = f"layer: {axes}" if "->" in axes and ":" not in axes else f"layer {axes}"
        whole, count = (axes, ()) if self.stack is None else (stacked, (len(self.stack),))
        if constant is not None:
            return kind(jnp.full((*count, *shape), constant, jnp.float32), axes=whole)
        lookup = axes.startswith("vocab") or "->" not in axes  # sums over nothing
        sums = ["embed"] if lookup else axes.split("->")[0].split(":")[-1].split()
        fan_in, key = math.prod(self.sizes[name] for name in sums), self.rngs.params()

        def draw(key: Array) -> Array:
            return jax.random.truncated_normal(key, -3, 3, shape, jnp.float32) * fan_in**-0.5

        if self.stack is None:
            return kind(draw(key), axes=whole)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(self.stack, jnp.uint32))
        return kind(jax.vmap(draw)(keys), axes=whole)


def use(weight: Any, dtype: Any) -> Array:
    """This device's shard of a weight in the compute type, whole along `embed`."""
    dims = [name for name in rules.names(weight.axes) if name != "layer"]
    value = weight[...].astype(dtype)
    value = collectives.gather(value, dims.index("embed")) if "embed" in dims else value
    # A name makes a new value of it, which a loop over layers would keep beside the weight itself.
    return value if value is weight[...] else checkpoint_name(value, "weight")


def flatten(module: nnx.Module) -> dict[str, Any]:
    """name -> `nnx.Variable` of every weight, in the order of the model, e.g. "layers.0.0.attention.q"."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}


def group(name: str) -> str:
    """What a weight is of: text, cross (attention), encoder or resampler."""
    return name.split(".")[1] if name.startswith("vision.") else "cross" if ".cross." in name else "text"


def assemble(module: nnx.Module, values: dict[str, Array]) -> Any:
    """The module with these values in place of its own."""
    graph, state = nnx.split(module)
    flat = [(path, variable.replace(values[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))

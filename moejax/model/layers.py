"""The small parts of a layer: norms, activations, the dense MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moejax import config as configs
from moejax.model.weights import Weights, use
from moejax.parallel import collectives

Stream = Float[Array, "B t D"]  # between the parts of a layer
Places = Int[Array, "B T"]  # positions of tokens in their sequence

lean = partial(jax.checkpoint, prevent_cse=False)  # for what is quicker made again than kept for the backward pass


@dataclass(frozen=True)
class Pass:
    """What one run through the model is told besides weights and tokens."""

    dtype: Any = jnp.float32  # of matmuls and activations
    training: bool = False
    sequence: bool = False  # activations between blocks are split over `tensor` along T
    remat: str = "none"
    drop: bool = True  # experts have the capacity of the config; False drops nothing
    key: Array | None = None  # of router jitter
    rows: Array | None = None  # Int "B": which sample each sequence is, whatever device holds it


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450), computed in float32."""

    def __init__(self, w: Weights, model: configs.Model):
        self.scale = w("norm", 1.0)
        self.bias = w("norm", 0.0) if "norm" in model.biases else None
        self.eps, self.center = model.norm_eps, model.norm == "layernorm"

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return lean(lambda x: normed(x, self.scale, self.bias, self.eps, self.center))(x)


def normed(x: Float[Array, "... D"], scale: Any, bias: Any, eps: float, center: bool) -> Float[Array, "... D"]:
    """x, less its mean if so told, over the root of its mean square; scaled, and with a bias if there is one."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True) if center else y
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return plus(y * scale[...].reshape(*[1] * (y.ndim - 1), -1), bias).astype(x.dtype)


def columns(h: Float[Array, "... U F"]) -> list[Float[Array, "... F"]]:
    """Gate and up, or up alone.  Their gradients are put side by side; those of slices would be padded and added.

    To be kept for the backward pass apart: CPUs read two stacks of layers faster than two slices of one.
    """
    return [part[..., 0, :] for part in jnp.split(h, h.shape[-2], -2)]


def clamped_swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"], slope: float, limit: float) -> Array:
    """GPT-OSS's: both halves are clamped, the sigmoid has a slope, and the second half starts at 1."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(gate * slope) * (up + 1)


ACTIVATIONS: dict[str, Callable[..., Array]] = {  # of what `columns` gives
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda h: h * jax.nn.sigmoid(1.702 * h),  # CLIP's approximation by a sigmoid
    "relu": jax.nn.relu,
    "geglu": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,  # arXiv 2002.05202
    "clamped_swiglu": clamped_swiglu}


@cache
def activation(model: configs.Model) -> Callable[..., Array]:
    """The model's of ACTIVATIONS, equal for equal models."""
    function = ACTIVATIONS[model.activation]
    return partial(function, slope=model.clamp[0], limit=model.clamp[1]) if function is clamped_swiglu else function


class MLP(nnx.Module):
    """The dense feed-forward layer; its output is this tensor shard's part of the sum."""

    def __init__(self, w: Weights, model: configs.Model):
        self.up, self.down = w("embed -> gate hidden"), w("hidden -> embed")
        biased = "mlp" in model.biases
        self.up_bias, self.down_bias = (w("gate hidden", 0.0), w("norm", 0.0)) if biased else (None, None)
        self.activation = activation(model)

    def __call__(self, x: Float[Array, "B T D"], run: Pass) -> Float[Array, "B T D"]:
        h = plus(jnp.einsum("btd,duf->btuf", x, use(self.up, run.dtype)), self.up_bias)
        project = lean(lambda down, *h: jnp.einsum("btf,fd->btd", self.activation(*h), down))
        y = project(use(self.down, run.dtype), *columns(h))
        return y if self.down_bias is None else y + collectives.once(self.down_bias[...].astype(y.dtype))[None, None]


def plus(x: Float[Array, "..."], bias: Any) -> Float[Array, "..."]:
    """x and a bias along its last dimensions, if there is one."""
    if bias is None:
        return x
    value = bias[...].astype(x.dtype)
    return x + value.reshape(*[1] * (x.ndim - value.ndim), *value.shape)


class DenseLayer(nnx.Module):
    """The feed-forward half of a block without experts."""

    def __init__(self, w: Weights, model: configs.Model):
        self.mlp = MLP(w, model)

    def __call__(self, x: Stream, run: Pass) -> tuple[Stream, None]:
        return collectives.leave(self.mlp(collectives.enter(x, run.sequence), run), run.sequence), None

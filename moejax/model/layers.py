"""The small parts of a layer: norms, activations, rotary positions, the dense MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moejax import config as configs
from moejax.model.weights import Weights, use
from moejax.parallel import collectives


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
    """RMSNorm (arXiv 1910.07467) or LayerNorm without bias (arXiv 1607.06450), computed in float32."""

    def __init__(self, w: Weights, model: configs.Model):
        self.scale = w("norm", 1.0)
        self.eps, self.center = model.norm_eps, model.norm == "layernorm"

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = x.astype(jnp.float32)
        if self.center:
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * self.scale[...][None, None]).astype(x.dtype)


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding (arXiv 2104.09864) on halves of the head: pair i turns by position × theta^(-2i/H)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def gelu(h: Float[Array, "... U F"]) -> Float[Array, "... F"]:
    return jax.nn.gelu(h[..., 0, :], approximate=True)


def swiglu(h: Float[Array, "... U F"]) -> Float[Array, "... F"]:
    """arXiv 2002.05202: SiLU of the first gate times the second."""
    return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]


def geglu(h: Float[Array, "... U F"]) -> Float[Array, "... F"]:
    return jax.nn.gelu(h[..., 0, :], approximate=True) * h[..., 1, :]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "swiglu": swiglu, "geglu": geglu}


class MLP(nnx.Module):
    """The dense feed-forward layer; its output is this tensor shard's part of the sum."""

    def __init__(self, w: Weights, model: configs.Model):
        self.up = w("embed -> gate hidden")
        self.down = w("hidden -> embed")
        self.activation = model.activation

    def __call__(self, x: Float[Array, "B T D"], run: Pass) -> Float[Array, "B T D"]:
        h = jnp.einsum("btd,duf->btuf", x, use(self.up, run.dtype))
        return jnp.einsum("btf,fd->btd", ACTIVATIONS[self.activation](h), use(self.down, run.dtype))


class DenseLayer(nnx.Module):
    """The feed-forward half of a block without experts."""

    def __init__(self, w: Weights, model: configs.Model):
        self.mlp = MLP(w, model)

    def __call__(self, x: Float[Array, "B t D"], run: Pass) -> tuple[Float[Array, "B t D"], None]:
        return collectives.leave(self.mlp(collectives.enter(x, run.sequence), run), run.sequence), None

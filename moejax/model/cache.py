"""Keys and values kept between decoding steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moejax import config as configs


class Cache(NamedTuple):
    """One layer's keys and values; `Transformer.cache` stacks them over layers in front."""

    k: Float[Array, "*L B S K H"]
    v: Float[Array, "*L B S K J"]

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K J"], positions: Int[Array, "B T"]) -> "Cache":
        """With T new positions of every sequence, which follow one another from positions[:, 0]."""
        put = jax.vmap(lambda old, new, at: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, 0))
        return Cache(put(self.k, k, positions[:, 0]), put(self.v, v, positions[:, 0]))


def empty(model: configs.Model, layers: int, batch: int, length: int, tensor: int, dtype: jnp.dtype) -> Cache:
    """Zeros for `layers` stacked layers on one device; a KV head that several shards need is kept on each."""
    shape = (layers, batch, length, max(model.kv_heads // tensor, 1))
    value = model.latent[3] if model.latent else model.head_dim
    return Cache(jnp.zeros((*shape, model.head_dim), dtype), jnp.zeros((*shape, value), dtype))

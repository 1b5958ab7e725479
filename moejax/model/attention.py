"""Causal self-attention: multi-head, grouped-query and multi-query in one layout.

Heads are ordered (kv, group), so that a tensor shard holds whole groups, or, with fewer KV heads than shards, part
of one group and the one KV head it needs.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moejax import config as configs
from moejax.model.cache import Cache
from moejax.model.layers import Pass, rotary
from moejax.model.weights import Weights, use
from moejax.parallel import collectives

BLOCKS = 8  # of queries at most; a block skips the keys after it
SMALLEST = 64  # queries worth a block of their own


class Attention(nnx.Module):
    def __init__(self, w: Weights, model: configs.Model):
        self.q = w("embed -> heads head")
        self.k = w("embed -> kv head")
        self.v = w("embed -> kv head")
        self.o = w("heads head -> embed")
        self.model = model

    def __call__(
        self, x: Float[Array, "B t D"], positions: Int[Array, "B T"], run: Pass, cache: Cache | None = None
    ) -> tuple[Float[Array, "B t D"], Cache | None]:
        """With a cache, x continues each sequence at `positions` and attends to what the cache holds before it."""
        x = collectives.enter(x, run.sequence)
        theta = self.model.rope_theta
        q = rotary(jnp.einsum("btd,dnh->btnh", x, use(self.q, run.dtype)), positions, theta)
        k = rotary(jnp.einsum("btd,dkh->btkh", x, self.own(use(self.k, run.dtype))), positions, theta)
        v = jnp.einsum("btd,dkh->btkh", x, self.own(use(self.v, run.dtype)))
        if cache is None:
            y = blocked(q, k, v)
        else:
            cache = cache.write(k, v, positions)
            y = plain(q, cache.k.astype(run.dtype), cache.v.astype(run.dtype), positions)
        y = jnp.einsum("btnh,nhd->btd", y, use(self.o, run.dtype))
        return collectives.leave(y, run.sequence), cache

    def own(self, w: Float[Array, "D K H"]) -> Float[Array, "D k H"]:
        """The KV heads that this shard's query heads use."""
        shards = lax.axis_size("tensor")
        if shards <= self.model.kv_heads:
            return w  # split over `tensor` like the queries
        head = collectives.index("tensor") * self.model.kv_heads // shards
        return lax.dynamic_slice_in_dim(w, head, 1, 1)


def plain(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], positions: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """Attention of queries at `positions` to all keys up to them; the slow twin of `blocked`."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * size**-0.5
    seen = jnp.arange(k.shape[1])[None, None, None, None] <= positions[:, None, None, :, None]
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(batch, length, heads, size)


def blocked(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Causal attention with (group, time) as the rows of one matmul per KV head, block of queries by block.

    Almost half of the scores lie after their query; a block multiplies only the keys up to its own end.
    """
    batch, length, heads, size = q.shape
    kv = k.shape[2]
    q = q.reshape(batch, length, kv, -1, size).transpose(0, 2, 3, 1, 4)  # B K G T H
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # B K H T and B K T H
    step = max(-(-length // BLOCKS), SMALLEST)
    done = [one_block(q[:, :, :, a:a + step], k[..., :a + step], v[:, :, :a + step]) for a in range(0, length, step)]
    return jnp.concatenate(done, 3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def one_block(
    q: Float[Array, "B K G t H"], k: Float[Array, "B K H s"], v: Float[Array, "B K s H"]
) -> Float[Array, "B K G t H"]:
    """Queries that end where the keys end."""
    batch, kv, group, length, size = q.shape
    rows = q.reshape(batch, kv, group * length, size)
    scores = jnp.einsum("bkrh,bkhs->bkrs", rows, k, preferred_element_type=jnp.float32) * size**-0.5
    last = jnp.arange(length) + k.shape[-1] - length
    seen = (jnp.arange(k.shape[-1])[None] <= jnp.tile(last, group)[:, None])[None, None]
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).astype(v.dtype)
    return jnp.einsum("bkrs,bksh->bkrh", p, v).reshape(q.shape)

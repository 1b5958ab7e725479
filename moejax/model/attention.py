"""Attention: causal (multi-head, grouped-query, multi-query and latent) and at images, in one layout.

Heads are ordered (kv, group): a tensor shard holds whole groups, or part of one group and the one KV head it needs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moejax import config as configs
from moejax.model.cache import Cache
from moejax.model.layers import Pass, Places, Stream, normed, plus
from moejax.model.rotary import rotary
from moejax.model.weights import Weights, use
from moejax.parallel import collectives

BLOCKS = 8  # of queries at most; a block skips the keys after it
SMALLEST = 64  # queries worth a block of their own
LATENT_EPS = 1e-6  # of the norms of latents, whatever the model's

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Values = Float[Array, "B S K J"]
Attended = Float[Array, "B T N J"]
Seen = Bool[Array, " B #T S"] | None  # where a query does not see all of the keys


@dataclass(frozen=True)
class Look:
    """How queries look at keys.  `sinks` are logits of each head that take part in its softmax and carry no value."""

    scale: float
    window: int | None = None  # keys seen, the query's own included
    cap: float = 0.0  # scores are cap · tanh(score / cap); 0 is off
    sinks: Float[Array, " N"] | None = None

    def sees(self, behind: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Args: behind: how many positions each key lies before its query."""
        return behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)

    def probabilities(self, scores: Float[Array, "B K *rows S"], seen: Bool[Array, "..."] | None
                      ) -> Float[Array, "B K *rows S"]:
        """Even shares where nothing is seen; `seen` is None where all is."""
        scores = scores * self.scale
        if self.cap:
            scores = self.cap * jnp.tanh(scores / self.cap)
        scores = scores if seen is None else scores + jnp.where(seen, 0.0, -1e30)
        if self.sinks is None:
            return softmax(scores)
        sinks = self.sinks.astype(jnp.float32).reshape(1, scores.shape[1], -1, 1)  # 1 K G 1
        sinks = sinks[..., None] if scores.ndim == 5 else jnp.repeat(sinks, scores.shape[2] // sinks.shape[2], 2)
        peak = lax.stop_gradient(jnp.maximum(jnp.max(scores, -1, keepdims=True), sinks))
        exp = jnp.exp(scores - peak)
        return exp / (jnp.sum(exp, -1, keepdims=True) + jnp.exp(sinks - peak))


@jax.custom_jvp
def softmax(scores: Float[Array, "... S"]) -> Float[Array, "... S"]:
    """Saves its result alone for the backward pass; jax.nn's saves the exponentials too."""
    return jax.nn.softmax(scores, -1)


softmax.defjvps(lambda change, p, scores: p * (change - jnp.sum(p * change, -1, keepdims=True)))


class Attention(nnx.Module):
    """`source` makes the weights of keys and values where these come from something of another width."""

    def __init__(self, w: Weights, model: configs.Model, window: int | None = None, source: Weights | None = None):
        self.q = w("embed -> heads head")
        self.k = (source or w)("embed -> kv head")
        self.v = (source or w)("embed -> kv head")
        self.o = w("heads head -> embed")
        self.q_bias, self.k_bias, self.v_bias = (
            w(axes, 0.0) if "qkv" in model.biases else None for axes in ("heads head", "kv head", "kv head"))
        self.o_bias = w("norm", 0.0) if "output" in model.biases else None
        self.sinks = w("heads", 0.0) if "sinks" in model.biases else None
        axes = {"none": (None, None), "head": ("head", "head"), "all": ("heads head", "kv head")}[model.qk_norm]
        self.q_norm, self.k_norm = (one and w(one, 1.0) for one in axes)
        biased = model.qk_norm == "head" and "norm" in model.biases
        self.q_norm_bias, self.k_norm_bias = (w("head", 0.0) if biased else None for _ in axes)
        self.model, self.window = model, window

    def __call__(self, x: Stream, positions: Places | None, run: Pass, cache: Cache | None = None) -> tuple[Array, Any]:
        """With a cache, x continues each sequence at `positions`; without positions everything sees everything."""
        if positions is None:
            return self.look(x, run), None
        q, k, v = self.turned(collectives.enter(x, run.sequence), positions, run)
        sinks = None if self.sinks is None else self.sinks[...]
        y, cache = attend(q, k, v, positions, look(self.model, self.window, sinks), cache)
        return leave(y, self.o, self.o_bias, run), cache

    def turned(self, x: Float[Array, "B T D"], positions: Places, run: Pass) -> tuple[Queries, Keys, Values]:
        q, k, v = self.project(x, run)
        return rotary(q, positions, self.model), rotary(k, positions, self.model), v

    def look(self, x: Stream, run: Pass, context: Float[Array, "B S W"] | None = None, seen: Seen = None) -> Stream:
        """x looks at all of a context, without order; at itself by default.  What sees nothing gets zeros."""
        x = collectives.enter(x, run.sequence)
        q, k, v = self.project(x, run, x if context is None else collectives.enter(context, False))
        return leave(plain(q, k, v, seen, Look(q.shape[-1]**-0.5)), self.o, self.o_bias, run, seen)

    def project(self, x: Float[Array, "B T D"], run: Pass,
                context: Float[Array, "B S W"] | None = None) -> tuple[Queries, Keys, Keys]:
        """Queries of x, keys and values of the context, which are not turned then; of x by default."""
        k_bias = None if self.k_bias is None else self.k_bias[...]
        if context is None:
            context = x
        elif k_bias is not None:  # the same for all scores of a query, it changes nothing: its gradient is rounding
            k_bias = lax.stop_gradient(k_bias)

        def owned(weight: Any, bias: Any) -> Array:
            y = jnp.einsum("btd,dkh->btkh", context, self.own(use(weight, run.dtype), 1))
            return y if bias is None else y + self.own(bias[...].astype(y.dtype), 0)[None, None]

        q = plus(jnp.einsum("btd,dnh->btnh", x, use(self.q, run.dtype)), self.q_bias)
        if self.model.qk_norm == "all":  # the norm of the keys needs all of them
            k = plus(jnp.einsum("btd,dkh->btkh", context, use(self.k, run.dtype)), self.k_bias)
            q, k = self.norm_all(q, self.q_norm, "heads"), self.own(self.norm_all(k, self.k_norm, "kv"), 2)
        else:
            k = owned(self.k, k_bias)
        v = owned(self.v, self.v_bias)
        if self.model.qk_norm == "head":
            q, k = (normed(y, scale, bias, self.model.norm_eps, self.model.norm == "layernorm") for y, scale, bias in (
                (q, self.q_norm, self.q_norm_bias), (k, self.k_norm, self.k_norm_bias)))
        limit = self.model.qkv_limit
        return (q, k, v) if limit is None else tuple(jnp.clip(y, -limit, limit) for y in (q, k, v))

    def norm_all(self, x: Queries, scale: Any, kind: str) -> Queries:
        """RMSNorm over all heads, which the tensor shards may share."""
        y, heads = x.astype(jnp.float32), self.model.heads if kind == "heads" else self.model.kv_heads
        square = jnp.sum(jnp.square(y), (2, 3), keepdims=True)
        square = collectives.total(square, ("tensor",)) if lax.axis_size("tensor") <= heads else square
        y = y * lax.rsqrt(square / (heads * self.model.head_dim) + self.model.norm_eps)
        return (y * scale[...][None, None]).astype(x.dtype)

    def own(self, w: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
        """The KV heads that this shard's query heads use."""
        heads, shards = self.model.kv_heads, lax.axis_size("tensor")
        if shards <= heads:
            return w  # split over `tensor` like the queries
        head = collectives.index("tensor") * heads // shards
        return lax.dynamic_slice_in_dim(w, head, 1, dim)


class LatentAttention(Attention):
    """Keys and values of all heads from one small latent per token (DeepSeek-V2, arXiv 2405.04434 section 2.1)."""

    def __init__(self, w: Weights, model: configs.Model, window: int | None = None):
        queries, keys, turned, size = model.latent
        w = w.sized(queries=queries, keys=keys, mixed=keys + turned, both=model.head_dim - turned + size)
        self.q_down, self.q_norm = (w("embed -> queries"), w("queries", 1.0)) if queries else (None, None)
        self.q = w("queries -> heads head" if queries else "embed -> heads head")
        self.kv_down, self.kv_norm, self.kv = w("embed -> mixed"), w("keys", 1.0), w("keys -> heads both")
        self.o = w.sized(head=size)("heads head -> embed")
        self.o_bias, self.q_down_bias, self.kv_down_bias = (
            w(one, 0.0) if "output" in model.biases and w.sizes[one] else None for one in ("norm", "queries", "mixed"))
        self.model, self.window, self.sinks = model, window, None

    def turned(self, x: Float[Array, "B T D"], positions: Places, run: Pass) -> tuple[Queries, Queries, Values]:
        y, (_, rank, turned, _) = x, self.model.latent
        still = self.model.head_dim - turned
        if self.q_down is not None:
            y = plus(jnp.einsum("btd,dr->btr", x, use(self.q_down, run.dtype)), self.q_down_bias)
            y = normed(y, self.q_norm, None, LATENT_EPS, False)
        q = jnp.einsum("btr,rnh->btnh", y, use(self.q, run.dtype))
        q = jnp.concatenate([q[..., :still], rotary(q[..., still:], positions, self.model)], -1)
        mixed = plus(jnp.einsum("btd,dr->btr", x, use(self.kv_down, run.dtype)), self.kv_down_bias)
        latent = normed(mixed[..., :rank], self.kv_norm, None, LATENT_EPS, False)
        both = jnp.einsum("btr,rnh->btnh", latent, use(self.kv, run.dtype))
        shared = rotary(mixed[..., None, rank:], positions, self.model)
        k = jnp.concatenate([both[..., :still], jnp.broadcast_to(shared, (*both.shape[:3], turned))], -1)
        return q, k, both[..., still:]


def look(model: configs.Model, window: int | None, sinks: Array | None) -> Look:
    scale = (model.multipliers[2] if model.multipliers else 0) or model.head_dim**-0.5
    return Look(scale, window, model.caps[0] if model.caps else 0.0, sinks)


def attend(q: Queries, k: Keys, v: Values, positions: Places, look: Look,
           cache: Cache | None) -> tuple[Attended, Cache | None]:
    if cache is None:
        return blocked(q, k, v, look), None
    cache = cache.write(k, v, positions)
    seen = look.sees(positions[..., None] - jnp.arange(cache.k.shape[1])[None, None])
    return plain(q, cache.k.astype(q.dtype), cache.v.astype(q.dtype), seen, look), cache


def leave(y: Attended, o: Any, bias: Any, run: Pass, seen: Seen = None) -> Stream:
    y = jnp.einsum("btnh,nhd->btd", y, use(o, run.dtype))
    if bias is not None:
        y = y + collectives.once(bias[...].astype(y.dtype))[None, None]
    if seen is not None:
        y = jnp.where(jnp.any(seen, -1, keepdims=True), y, 0)
    return collectives.leave(y, run.sequence)


def plain(q: Queries, k: Keys, v: Values, seen: Seen, look: Look) -> Attended:
    """Attention to the keys that are seen; the slow twin of `blocked`."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    p = look.probabilities(scores, None if seen is None else seen[:, None, None]).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(batch, length, heads, -1)


def blocked(q: Queries, k: Keys, v: Values, look: Look) -> Attended:
    """Causal attention, (group, time) the rows of a matmul per KV head; blocks of queries skip keys they cannot see."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size).transpose(0, 2, 3, 1, 4)  # B K G T H
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)  # B K H T and B K J T
    step, done = max(-(-length // BLOCKS), SMALLEST), []
    cuts = list(range(step, length, step))  # no slices: their gradients would be padded, and slow to add up on CPUs
    qs, ks, vs = jnp.split(q, cuts, 3), jnp.split(k, cuts, 3), jnp.split(v, cuts, 3)
    for i, rows in enumerate(qs):
        begin = 0 if look.window is None else max(i * step - look.window + 1, 0)
        seen, off = slice(begin // step, i + 1), begin % step
        done.append(one_block(rows, jnp.concatenate(ks[seen], 3)[..., off:], jnp.concatenate(vs[seen], 3)[..., off:],
                              look))
    return jnp.concatenate(done, 3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def one_block(q: Float[Array, "B K G t H"], k: Float[Array, "B K H s"], v: Float[Array, "B K J s"],
              look: Look) -> Float[Array, "B K G t J"]:
    """Queries that end where the keys end."""
    batch, kv, group, length, size = q.shape
    scores = jnp.einsum("bkrh,bkhs->bkrs", q.reshape(batch, kv, -1, size), k, preferred_element_type=jnp.float32)
    behind = (jnp.arange(length) + k.shape[-1] - length)[:, None] - jnp.arange(k.shape[-1])[None]
    p = look.probabilities(scores, jnp.tile(look.sees(behind), (group, 1))[None, None]).astype(v.dtype)
    return jnp.einsum("bkrs,bkhs->bkrh", p, v).reshape(batch, kv, group, length, -1)

"""Cross-entropy over a vocabulary that is split over `tensor`, in chunks of tokens.

One chunk of logits exists at a time, and the gradient is made from it in the forward pass: 3 matmuls instead of 4.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moejax.parallel import collectives

CHUNK = 1024  # tokens


def cross_entropy(hidden: Float[Array, "N D"], weight: Float[Array, "D V"], targets: Int[Array, " N"],
                  weights: Float[Array, " N"], cap: float = 0.0) -> Float[Array, ""]:
    """Sum over tokens of weights × −log p(target), in nats; differentiable in `hidden` and `weight`.

    Args: weight: this tensor shard's columns; targets: count over the whole vocabulary; cap: logits are
        cap · tanh(logit / cap), of Gemma 2 (arXiv 2408.00118 section 2); 0 is off.
    """
    hidden, weight = collectives.match((hidden, weight), hidden, weight, weights)
    return collectives.total(share(hidden, weight, targets, weights, cap), ("tensor",))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def share(hidden: Array, weight: Array, targets: Array, weights: Array, cap: float) -> Array:
    """An equal part of the loss for each tensor shard.  The gradient of the sum of all shares, in this shard's copy of
    `hidden`, is what its own columns add to it.
    """
    def step(total: Array, chunk: Any) -> tuple[Array, None]:
        return total + one_chunk(chunk[0], weight, *chunk[1:], cap)[0], None

    zero = collectives.match(jnp.zeros((), jnp.float32), hidden)
    return lax.scan(step, zero, chunks(hidden, targets, weights))[0]


def forward(hidden: Array, weight: Array, targets: Array, weights: Array, cap: float) -> tuple[Array, Any]:
    def step(carry: Any, chunk: Any) -> tuple[Any, Array]:
        loss, error = one_chunk(chunk[0], weight, *chunk[1:], cap)
        error = error.astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,dv->nd", error, weight, preferred_element_type=jnp.float32)
        d_weight = jnp.einsum("nd,nv->dv", chunk[0], error, preferred_element_type=jnp.float32)
        return (carry[0] + loss, carry[1] + d_weight), d_hidden.astype(hidden.dtype)

    zero = collectives.match((jnp.zeros((), jnp.float32), jnp.zeros(weight.shape, jnp.float32)), hidden)
    (loss, d_weight), d_hidden = lax.scan(step, zero, chunks(hidden, targets, weights))
    return loss, (d_hidden.reshape(-1, hidden.shape[1])[:len(hidden)], d_weight.astype(weight.dtype))


def backward(cap: float, saved: Any, grad: Array) -> tuple[Array, Array, None, None]:
    d_hidden, d_weight = ((grad * d.astype(jnp.float32)).astype(d.dtype) for d in saved)
    return d_hidden, d_weight, None, None


share.defvjp(forward, backward)


def chunks(*parts: Array) -> tuple[Array, ...]:
    """Hidden states, targets and weights in equal chunks of tokens, the last padded with tokens of weight 0."""
    tokens = len(parts[0])
    count = -(-tokens // CHUNK)
    size = -(-tokens // count)
    if pad := count * size - tokens:
        parts = tuple(jnp.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)]) for x in parts)
    return tuple(x.reshape(count, size, *x.shape[1:]) for x in parts)


def one_chunk(hidden: Array, weight: Array, targets: Array, weights: Array, cap: float) -> tuple[Array, Array]:
    """The chunk's share of the loss, and the gradient of the loss in this shard's logits, [N V]."""
    logits = jnp.einsum("nd,dv->nv", hidden, weight, preferred_element_type=jnp.float32)
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    local = targets - collectives.index("tensor") * weight.shape[1]
    hit, inside = jax.nn.one_hot(local, weight.shape[1], dtype=bool), (local >= 0) & (local < weight.shape[1])
    mine = jnp.take_along_axis(logits, jnp.where(inside, local, 0)[:, None], 1)[:, 0]  # a sum of hits writes them out
    peak = collectives.highest(jnp.max(logits, -1))
    exp = jnp.exp(logits - peak[:, None])
    total, mine = collectives.total((jnp.sum(exp, -1), jnp.where(inside, mine, 0)), ("tensor",))
    loss = jnp.sum(weights * (jnp.log(total) + peak - mine)) / lax.axis_size("tensor")
    error = (exp / total[:, None] - hit.astype(exp.dtype)) * weights[:, None]
    error = error * (1 - jnp.square(logits / cap)) if cap else error
    return collectives.match(loss, logits), collectives.match(error, logits)

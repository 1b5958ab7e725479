"""The next token from logits."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def sample(logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""], keys: Array
           ) -> Int[Array, " B"]:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature) among the fewest tokens
    whose probabilities reach top_p (nucleus sampling, arXiv 1904.09751).  The keys are one a sequence.
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled, -1, stable=True)
    scaled = jnp.take_along_axis(scaled, order, -1)
    p = jax.nn.softmax(scaled, -1)
    kept = jnp.where(jnp.cumsum(p, -1) - p < top_p, scaled, -jnp.inf)  # the likeliest token always is
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    drawn = jnp.take_along_axis(order, drawn[:, None], -1)[:, 0]
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)

"""Gated cross-attention from text to images (Flamingo, arXiv 2204.14198, section 2.2 and figure 4)."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from moejax import config as configs
from moejax.model.attention import Attention
from moejax.model.layers import MLP, Norm, Pass, Stream
from moejax.model.weights import Weights
from moejax.parallel import collectives


class Sight(NamedTuple):
    """What the tokens of a batch can look at."""

    values: Float[Array, "B I O W"]
    there: Bool[Array, "B I O"]
    looks: Bool[Array, "B T I"]

    def flat(self) -> tuple[Float[Array, "B S W"], Bool[Array, "B T S"]]:
        """All images of a sequence side by side, and which of it each token sees."""
        batch, tokens, _ = self.looks.shape
        seen = self.looks[..., None] & self.there[:, None]
        return self.values.reshape(batch, -1, self.values.shape[-1]), seen.reshape(batch, tokens, -1)


class GatedCross(nnx.Module):
    """Cross-attention and an MLP, each added through the tanh of a gate that starts at 0, where an image is seen."""

    def __init__(self, w: Weights, model: configs.Model):
        rules = model.looks()
        self.norm = Norm(w, model)
        inner = replace(model, qk_norm=rules.norm, biases=(), qkv_limit=None)
        self.attention = Attention(w, inner, source=w.sized(embed=model.encoder().width))
        self.feed_norm, self.mlp = Norm(w, model), MLP(w, model)
        axes = "one" if rules.gate == "number" else "norm"
        self.gate, self.feed_gate = w(axes, 0.0), w(axes, 0.0)
        self.every = rules.feed == "every"  # token passes the MLP

    def __call__(self, x: Stream, sight: Sight | None, run: Pass) -> Stream:
        if sight is None and not self.every:
            return x
        if sight is not None:
            context, seen = sight.flat()
            x = x + tanh(self.gate, self.attention.look(self.norm(x), run, context.astype(x.dtype), seen))
        y = self.mlp(collectives.enter(self.feed_norm(x), run.sequence), run)
        if not self.every:
            y = jnp.where(jnp.any(seen, -1, keepdims=True), y, 0)
        return x + tanh(self.feed_gate, collectives.leave(y, run.sequence))


def tanh(gate: Any, y: Stream) -> Stream:
    return jnp.tanh(gate[...])[None, None].astype(y.dtype) * y

"""A layer: gated cross-attention where there is one, attention, feed-forward; and layers one after another."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moejax import config as configs
from moejax.model.attention import Attention, LatentAttention
from moejax.model.cache import Cache
from moejax.model.cross import GatedCross, Sight
from moejax.model.layers import DenseLayer, Norm, Pass, Places, Stream
from moejax.model.moe import MoELayer
from moejax.model.weights import Weights
from moejax.parallel import collectives

FEEDS = {"M": MoELayer, "D": DenseLayer}  # by the letters of Model.pattern


class Block(nnx.Module):
    """Attention and feed-forward, each added to what flows past (pre-norm)."""

    def __init__(self, w: Weights, model: configs.Model, letter: str):
        self.attention_norm = Norm(w, model)
        attention = LatentAttention if model.latent else Attention
        self.attention = attention(w, model, model.window if letter.islower() else None)
        self.feed_norm = Norm(w, model)
        self.feed = FEEDS[configs.CROSSED.get(letter, letter).upper()](w, model)
        self.scale = model.multipliers[1] if model.multipliers else 1.0
        self.cross = GatedCross(w, model) if letter in configs.CROSSED else None  # last: the rest starts as without

    def __call__(self, x: Stream, positions: Places | None, run: Pass, cache: Cache | None,
                 sight: Sight | None = None) -> tuple[Stream, Cache | None, Any]:
        x = x if self.cross is None else self.cross(x, sight, run)
        y, cache = self.attention(self.attention_norm(x), positions, run, cache)
        x = x + (y if self.scale == 1 else y * self.scale)
        y, decisions = self.feed(self.feed_norm(x), run)
        return x + (y if self.scale == 1 else y * self.scale), cache, decisions


def scan_blocks(blocks: list[Any], x: Stream, positions: Places | None, run: Pass, cache: list[Cache | None],
                numbers: Array | None = None, present: Array | None = None, sight: Any = None) -> tuple[Stream, Any]:
    """Stacked blocks, one after another, repeated along their stack; `numbers` and `present` of every layer, [repeats,
    len(blocks)], as in Transformer.layers.  Returns x, (the caches, the MoE layers' decisions in layer order or None).
    """
    parts = [nnx.split(block) for block in blocks]

    def body(x: Array, inputs: Any) -> tuple[Array, Any]:
        states, cache, numbers, present = inputs
        out = []
        for i, (graph, _) in enumerate(parts):
            here = run if run.key is None else replace(run, key=jax.random.fold_in(run.key, numbers[i]))

            def block(x: Array, graph: Any = graph, state: Any = states[i], here: Pass = here, i: int = i) -> Any:
                return nnx.merge(graph, state)(x, positions, here, cache[i], sight)

            x, new, decisions = block(x) if present is None else collectives.only_if(
                present[i], block, lambda x, kind: (x, *collectives.zeros(kind[1:])), x)
            out.append((new, decisions))
        return x, ([new for new, _ in out], [found for _, found in out if found is not None])

    x, (cache, found) = lax.scan(remat(body, run.remat), x, ([state for _, state in parts], cache, numbers, present))
    if not found:
        return x, (cache, None)
    # [repeats] of each block of the unit, to layer order
    return x, (cache, jax.tree.map(lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]), *found))


def remat(body: Any, policy: str) -> Any:
    """By what the backward pass makes again: at `none` what is quick (`lean`), at `full` all but the layer's input."""
    policies = {"weights": jax.checkpoint_policies.save_anything_except_these_names("weight"),  # as made for use
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    return body if policy == "none" else jax.checkpoint(body, policy=policies[policy], prevent_cse=False)

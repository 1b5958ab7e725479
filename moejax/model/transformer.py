"""The decoder-only transformer, as what one device does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moejax import config as configs
from moejax.model import cache as caches
from moejax.model.block import Block, scan_blocks
from moejax.model.cache import Cache
from moejax.model.cross import Sight
from moejax.model.layers import Norm, Pass, Places, Stream
from moejax.model.router import Losses, Routing
from moejax.model.vision import Tower
from moejax.model.weights import Weights, use
from moejax.parallel import collectives

Caches = list[list[Cache]]  # of the blocks of each run


class Output(NamedTuple):
    """Of a whole forward pass; `routing` is stacked over the MoE layers, [L B T A]."""

    logits: Float[Array, "B T V"] | None
    hidden: Float[Array, "B T D"]
    routing: Routing | None
    losses: Losses | None


class Transformer(nnx.Module):
    """Runs of equal layers are stacked, each one `lax.scan`: depth costs no compile time.  `vision` may be left out."""

    def __init__(self, model: configs.Model, key: Array, tower: bool = True):
        w, at, text = Weights(model, key), stacks(model), model.layers > 0
        self.embedding = w("vocab -> embed") if text else None
        self.runs = nnx.List([
            nnx.List([Block(w.layers(at[f"runs.{number}.{i}"]), model, letter) for i, letter in enumerate(unit)])
            for number, (unit, _) in enumerate(runs(model))])
        self.norm = Norm(w, model) if text else None
        self.head = w("embed -> vocab") if text and not model.tied else None
        self.head_bias = w("vocab", 0.0) if text and "head" in model.biases else None
        self.vision = Tower(w, model) if model.vision and tower else None
        self.model = model

    def __call__(self, tokens: Int[Array, "B T"], run: Pass, positions: Int[Array, "B T"] | None = None,
                 cache: Caches | None = None, sight: Sight | None = None) -> tuple[Output, Caches | None]:
        """Hidden states after the last norm, and every routing; logits are `self.logits(hidden)`.  With a cache (from
        `self.cache`), tokens continue each sequence at `positions`.  `sight` comes from `self.see(images, run)`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x, found, caches_out = self.layers(self.embed(tokens, run), positions, run, cache, sight=sight)
        routing, losses = found or (None, None)
        return Output(None, self.norm(x), routing, losses), caches_out if cache is not None else None

    def layers(self, x: Stream, positions: Places, run: Pass, cache: Caches | None = None,
               numbers: Int[Array, " L"] | None = None, present: Bool[Array, " L"] | None = None,
               sight: Sight | None = None) -> tuple[Stream, tuple[Routing, Losses] | None, list[list[Cache | None]]]:
        """All blocks, one after another: x, the decisions of the MoE layers stacked in their order, the caches.

        Args: numbers: of the layers in the whole model, which name their random numbers, counted from 0 by default;
            present: False leaves a layer out, as if it were not there; its decisions are zeros.
        """
        numbers = jnp.arange(self.model.layers, dtype=jnp.int32) if numbers is None else numbers
        decisions, caches_out, first = [], [], 0
        for number, (blocks, (unit, repeats)) in enumerate(zip(self.runs, runs(self.model), strict=True)):
            old = cache[number] if cache is not None else [None] * len(unit)
            here = slice(first, first + len(unit) * repeats)
            which = [None if each is None else each[here].reshape(repeats, -1) for each in (numbers, present)]
            x, (new, found) = scan_blocks(list(blocks), x, positions, run, old, *which, sight)
            first = here.stop
            caches_out.append(new)
            decisions += [found] if found is not None else []
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *decisions) if decisions else None, caches_out

    def see(self, images: Any, run: Pass) -> Sight | None:
        """What tokens can look at, of the images of a batch (data/batch.py), if it has any."""
        return None if images is None else Sight(*self.vision(images.pixels, images.frames, run), images.looks)

    def embed(self, tokens: Int[Array, "B T"], run: Pass) -> Stream:
        """Each tensor shard looks up the tokens of its part of the vocabulary; the rest are zero and summed away."""
        table = use(self.embedding, run.dtype)
        local = tokens - collectives.index("tensor") * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        x = jnp.where(here[..., None], jnp.take(table, jnp.where(here, local, 0), axis=0), 0)
        if self.model.multipliers:
            x = x * self.model.multipliers[0]
        return collectives.leave(x, run.sequence)

    def output(self, hidden: Stream, run: Pass) -> tuple[Float[Array, "B T X"], Float[Array, "X V"]]:
        """Two factors of this tensor shard's part of the logits.  A bias is a last row, for a last entry of 1."""
        hidden = collectives.enter(hidden, run.sequence)
        weight = use(self.embedding, run.dtype).T if self.head is None else use(self.head, run.dtype)
        if self.model.multipliers:
            hidden = hidden * self.model.multipliers[3]
        if self.head_bias is not None:
            ones = collectives.match(jnp.ones((*hidden.shape[:2], 1), hidden.dtype), hidden)
            hidden = jnp.concatenate([hidden, ones], -1)
            weight = jnp.concatenate([weight, self.head_bias[...].astype(weight.dtype)[None]])
        return hidden, weight

    @property
    def cap(self) -> float:
        """Soft cap of the logits; 0 is none."""
        return self.model.caps[1] if self.model.caps else 0.0

    def logits(self, hidden: Stream, run: Pass) -> Float[Array, "B T V"]:
        """This tensor shard's part of the vocabulary, float32."""
        hidden, weight = self.output(hidden, run)
        logits = jnp.einsum("btd,dv->btv", hidden, weight, preferred_element_type=jnp.float32)
        return self.cap * jnp.tanh(logits / self.cap) if self.cap else logits

    def cache(self, batch: int, length: int, dtype: Any) -> Caches:
        """Empty caches for `batch` sequences of up to `length` tokens on this device."""
        return [[caches.empty(self.model, repeats, batch, length, lax.axis_size("tensor"), dtype) for _ in unit]
                for unit, repeats in runs(self.model)]


def runs(model: configs.Model) -> list[tuple[str, int]]:
    """The layers as the fewest repeated units of up to 8: "DDDMMMM" is [("D", 3), ("M", 4)], "DMDM" is [("DM", 2)]."""
    kinds = model.layer_letters()
    best: list[tuple[int, list[tuple[str, int]]]] = [(0, [])]  # letters to compile, and the units, by layers so far
    for end in range(1, len(kinds) + 1):
        options = []
        for width in range(1, min(8, end) + 1):
            unit, repeats = kinds[end - width:end], 1
            while kinds[:end].endswith(unit * repeats):
                cost, before = best[end - width * repeats]
                options.append((cost + width, [*before, (unit, repeats)]))
                repeats += 1
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[-1][1]


def abstract(model: configs.Model, tower: bool = True) -> Transformer:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Transformer(model, jax.random.key(0), tower))


def stacks(model: configs.Model) -> dict[str, list[int]]:
    """Prefix of the names of stacked weights, such as "runs.0.1" -> the numbers of the layers in the stack."""
    found, first = {}, 0
    for number, (unit, repeats) in enumerate(runs(model)):
        for i in range(len(unit)):
            found[f"runs.{number}.{i}"] = [first + i + len(unit) * r for r in range(repeats)]
        first += len(unit) * repeats
    return found


def moe_layers(model: configs.Model) -> dict[str, list[int]]:
    """Name of each stack of balancing biases -> the numbers of its layers among the MoE layers."""
    kinds = model.layer_kinds()
    return {f"{prefix}.feed.bias": [kinds[:layer].count("M") for layer in layers]
            for prefix, layers in stacks(model).items() if kinds[layers[0]] == "M"}

"""Continue prompts with a KV cache, on the mesh of the model, as one program.

Sequences of different lengths stand left-aligned; each decodes at its own position, overwriting the keys that its
padding left in the cache before it could attend to them.  No expert drops a token here.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P, lax
from jaxtyping import Int

from moejax.config import require
from moejax.data.batch import Images
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import collectives
from moejax.parallel.axes import rows
from moejax.serve.sampling import sample

BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


def generate_tokens(sharded: Sharded, weights: dict[str, Array], prompts: Sequence[Sequence[int]], new: int,
                    ends: Sequence[int] = (), temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
                    images: Images | None = None) -> list[list[int]]:
    """Up to `new` tokens after each prompt, without the prompt; a sequence stops after any of `ends`.

    The `looks` of the images are those of the prompts' tokens; what is new looks at what the last one did.  Raises
    ConfigError: an empty prompt, wrong sampling values, or a router that looks ahead.
    """
    check(sharded, prompts, new, temperature, top_p)
    length = -(-max(map(len, prompts)) // BUCKET) * BUCKET
    shards = sharded.config.mesh.batch_shards()
    count = -(-len(prompts) // shards) * shards
    tokens = np.zeros((count, length), np.int32)
    lengths = np.ones(count, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, :len(prompt)] = prompt
        lengths[i] = len(prompt)
    if images is not None:
        looks = np.pad(images.looks, [(0, 0), (0, length - images.looks.shape[1]), (0, 0)])
        images = Images(*(np.pad(each, [(0, count - len(each)), *[(0, 0)] * (each.ndim - 1)])
                          for each in (images.pixels, images.frames, looks)))
    inputs = on_mesh(sharded.mesh, (tokens, lengths, np.arange(count, dtype=np.int32), images))
    stop = jnp.array(tuple(ends) or (-1,), jnp.int32)  # no token is -1
    options = (jnp.float32(temperature), jnp.float32(top_p), jax.random.key(seed), stop)
    out = np.asarray(program(sharded, new)(weights, *inputs, *options))[: len(prompts)].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), new)] for row in out]


def check(sharded: Sharded, prompts: Sequence[Sequence[int]], new: int, temperature: float, top_p: float) -> None:
    model = sharded.config.model
    rules = {
        "a prompt has at least one token; got an empty one": prompts and all(map(len, prompts)),
        f"max_new_tokens must be 1 or more; got {new}": new >= 1,
        f"temperature must not be negative; got {temperature}; 0 takes the likeliest token": temperature >= 0,
        f"top_p must be above 0 and at most 1; got {top_p}": 0 < top_p <= 1,
        "generation needs a router that does not look ahead; this model's is expert_choice, whose experts choose among "
        "all tokens of a sequence; train with router topk or sigmoid":
            model.moe.router != "expert_choice" or "M" not in model.layer_kinds()}
    require(rules)


@lru_cache(maxsize=8)
def program(sharded: Sharded, new: int) -> Any:
    """jitted (weights, tokens "B T", lengths, index " B", images, options) -> tokens "B new"; after an end, ends[0]."""
    row = rows(sharded.mesh.shape)

    def device(values: dict[str, Array], tokens: Int[Array, "B T"], lengths: Int[Array, " B"], index: Int[Array, " B"],
               images: Images | None, temperature: Array, top_p: Array, key: Array, ends: Array) -> Int[Array, "B new"]:
        model = sharded.build(values)
        run = sharded.run(sequence=False, remat="none", drop=False)
        batch, length = tokens.shape
        sight = model.see(images, run)
        last = sight and sight._replace(looks=jnp.take_along_axis(sight.looks, (lengths - 1)[:, None, None], 1))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)

        def choose(hidden: Array, positions: Array) -> Array:
            logits = collectives.everywhere(model.logits(hidden[:, None], run)[:, 0], 1)
            return sample(logits, temperature, top_p, jax.vmap(jax.random.fold_in)(keys, positions))

        def over(token: Array) -> Array:
            return (token[:, None] == ends).any(-1).astype(jnp.int32)

        def more(carry: Any) -> Array:
            i, _, ended, _, _ = carry
            return (i < new) & (collectives.total(jnp.sum(1 - ended), ("data", "fsdp", "expert")) > 0)

        def decode(carry: Any) -> Any:
            i, token, ended, out, cache = carry
            at = lengths + i - 1
            output, cache = model(token[:, None], run, at[:, None], cache, last)
            token = jnp.where(ended == 1, ends[0], choose(output.hidden[:, 0], at + 1))
            return i + 1, token, ended | over(token), out.at[:, i].set(token), cache

        # Keys and values vary over `tensor` where heads are split, even before anything is written.
        empty = collectives.vary(collectives.match(model.cache(batch, length + new, run.dtype), tokens), ("tensor",))
        # What pads a prompt has the place of its last token: scalings of positions look at how far a sequence goes.
        starts = jnp.minimum(jnp.arange(length, dtype=jnp.int32)[None], lengths[:, None] - 1)
        output, cache = model(tokens, run, starts, empty, sight)
        first = choose(jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], 1)[:, 0], lengths)
        out = collectives.match(jnp.full((batch, new), ends[0], jnp.int32), tokens).at[:, 0].set(first)
        return lax.while_loop(more, decode, (1, first, over(first), out, cache))[3]

    return jax.jit(sharded.program(device, (row, row, row, row, P(), P(), P(), P()), row))

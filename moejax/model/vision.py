"""Images and videos to a few vectors each: a vision transformer (arXiv 2010.11929) as CLIP (arXiv 2103.00020) and
SigLIP (arXiv 2303.15343) build it, and Flamingo's Perceiver resampler (arXiv 2204.14198, appendix A.1.1).  Both are
made of the text model's own parts, told by a config of their own.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int, Num

from moejax import config as configs
from moejax.model.attention import Attention, Look, leave, plain
from moejax.model.block import Block, scan_blocks
from moejax.model.layers import MLP, Norm, Pass, plus
from moejax.model.weights import Weights, use
from moejax.parallel import collectives

LATENT_EPS = 1e-5  # of the resampler's norms


class Features(NamedTuple):
    """Of images by themselves: of every patch, the class token first where there is one, and of the whole."""

    hidden: Float[Array, "N P W"]
    pooled: Float[Array, "N W"] | None


class Tower(nnx.Module):
    def __init__(self, w: Weights, model: configs.Model):
        self.encoder = Encoder(w, model.encoder())
        self.resampler = Resampler(w, model) if model.cross and model.looks().latents else None

    def __call__(self, pixels: Num[Array, "B I F S S 3"], frames: Int[Array, "B I"],
                 run: Pass) -> tuple[Float[Array, "B I O W"], Bool[Array, "B I O"]]:
        """Vectors of every image, and which are there; `frames` counts their frames.  Pixels: bytes, or normalised."""
        batch, images, most = pixels.shape[:3]
        run = replace(run, sequence=False, key=None)
        hidden = self.encoder.hidden(pixels.reshape(-1, *pixels.shape[3:]), run)
        hidden = hidden.reshape(batch * images, most, *hidden.shape[1:])
        if self.resampler is not None:
            there = jnp.arange(most)[None] < frames.reshape(-1)[:, None]
            hidden = self.resampler(hidden, there, run)
        values = hidden.reshape(batch, images, -1, hidden.shape[-1])
        return values, self.there(frames, values.shape[2], most)

    def there(self, frames: Int[Array, "B I"], size: int, most: int) -> Bool[Array, "B I O"]:
        """Latents are there if there is an image, patches if there is their frame."""
        frame = jnp.zeros(size, jnp.int32) if self.resampler is not None else jnp.arange(size) // (size // most)
        return frame[None, None] < frames[:, :, None]


class Encoder(nnx.Module):
    def __init__(self, w: Weights, told: Any):
        side = told.size // told.patch
        clip = told.kind == "clip"  # a class token, a norm before the layers, and no bias of patches
        self.model = configs.Model(
            layers=told.layers, pattern="D", d_model=told.width, heads=told.heads, kv_heads=told.heads,
            head_dim=told.width // told.heads, hidden=told.hidden, activation=told.act, norm="layernorm",
            norm_eps=told.eps, biases=("qkv", "output", "mlp", "norm"))
        w = Weights(self.model, w.rngs.params()).sized(
            colour=3, row=told.patch, column=told.patch, place=(told.grid or side) ** 2 + clip, three=3)
        self.patch, self.patch_bias = w("colour row column -> embed"), None if clip else w("norm", 0.0)
        self.token = w("embed") if clip else None
        self.positions = w("place embed")
        self.pre_norm = Norm(w, self.model) if clip else None
        self.block = Block(w.layers(range(told.layers)), self.model, "D")
        self.post_norm = Norm(w, self.model)
        self.pool = Pool(w, self.model) if told.pool else None
        self.told, self.clip = told, clip

    def hidden(self, pixels: Num[Array, "N S S 3"], run: Pass) -> Float[Array, "N P W"]:
        """As another model uses it: SigLIP's are after the last norm, CLIP's before."""
        x = self.patches(pixels, run.dtype)
        if self.clip:
            token = jnp.broadcast_to(use(self.token, run.dtype), (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([token, x], 1)
        x = x + self.places(x.shape[1], run.dtype)[None]
        x = self.pre_norm(x) if self.clip else x
        x, _ = scan_blocks([self.block], x, None, run, [None])
        return x if self.clip else self.post_norm(x)

    def __call__(self, pixels: Num[Array, "N S S 3"], run: Pass) -> Features:
        """With what stands for the whole image: the class token, or what SigLIP's head makes."""
        hidden = self.hidden(pixels, run)
        if self.clip:
            return Features(hidden, self.post_norm(hidden[:, :1])[:, 0])
        return Features(hidden, None if self.pool is None else self.pool(hidden, run))

    def patches(self, pixels: Num[Array, "N S S 3"], dtype: Any) -> Float[Array, "N P W"]:
        if pixels.dtype == jnp.uint8:
            mean, std = (jnp.array(each, jnp.float32)[None, None, None] for each in (self.told.mean, self.told.std))
            pixels = (pixels.astype(jnp.float32) / 255 - mean) / std
        size, side = self.told.patch, pixels.shape[1] // self.told.patch
        cut = pixels[:, :side * size, :side * size].astype(dtype).reshape(len(pixels), side, size, side, size, 3)
        x = jnp.einsum("nyrxcu,urcw->nyxw", cut, use(self.patch, dtype))
        return plus(x.reshape(len(x), side * side, -1), self.patch_bias)

    def places(self, count: int, dtype: Any) -> Float[Array, "P W"]:
        """The learned positions, stretched over the patches there are."""
        table, first = use(self.positions, jnp.float32), int(self.clip)
        old, new = (round((number - first) ** 0.5) for number in (len(table), count))
        if old != new:
            grid = table[first:].reshape(old, old, -1)
            weights = jnp.asarray(cubic(old, new))
            grid = jnp.einsum("yi,xj,ijw->yxw", weights, weights, grid)
            table = jnp.concatenate([table[:first], grid.reshape(new * new, -1)])
        return table.astype(dtype)


def cubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of bicubic interpolation along one side as torch has it: centres aligned, a = -0.75, edges repeated."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    found = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        place = np.floor(at) + tap
        d, a = np.abs(at - place), -0.75
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(found, (np.arange(new), np.clip(place, 0, old - 1).astype(int)), np.where(d <= 1, near, far))
    return found


class Pool(nnx.Module):
    """SigLIP's head: one learned query looks at all patches, then an MLP."""

    def __init__(self, w: Weights, model: configs.Model):
        self.probe = w("norm", 0.0)
        self.qkv, self.qkv_bias = w("embed -> three heads head"), w("three heads head", 0.0)
        self.o, self.o_bias = w("heads head -> embed"), w("norm", 0.0)
        self.norm, self.mlp = Norm(w, model), MLP(w, model)

    def __call__(self, x: Float[Array, "N P W"], run: Pass) -> Float[Array, "N W"]:
        x = collectives.enter(x, False)
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        q, k, v = (plus(jnp.einsum("npw,wuh->npuh", y, use(self.qkv, x.dtype)[:, i]), self.qkv_bias[...][i])
                   for i, y in enumerate((probe, x, x)))
        x = leave(plain(q, k, v, None, Look(q.shape[-1]**-0.5)), self.o, self.o_bias, run)
        y = self.mlp(collectives.enter(self.norm(x), False), run)
        return (x + collectives.leave(y, False))[:, 0]


class Resampler(nnx.Module):
    """A fixed number of latents look, layer by layer, at the patches of all frames and at themselves."""

    def __init__(self, w: Weights, model: configs.Model):
        told, rules = model.encoder(), model.looks()
        inner = configs.Model(
            layers=rules.depth, pattern="D", d_model=told.width, heads=rules.heads, kv_heads=rules.heads,
            head_dim=rules.head, hidden=4 * told.width, activation="relu", norm="layernorm", norm_eps=LATENT_EPS,
            qk_norm=rules.latent_norm, biases=("norm",))
        w = Weights(inner, w.rngs.params()).sized(latent=rules.latents, place=rules.frames)
        self.latents = w("latent embed")
        self.times = w("place embed") if rules.frames > 1 else None
        self.layer = ResamplerLayer(w.layers(range(rules.depth)), inner)
        self.norm = Norm(w, inner)

    def __call__(self, x: Float[Array, "N F P W"], there: Bool[Array, "N F"], run: Pass) -> Float[Array, "N O W"]:
        if self.times is not None:
            x = x + use(self.times, x.dtype)[None, :x.shape[1], None]
        there = jnp.repeat(there, x.shape[2], 1)
        x = x.reshape(len(x), -1, x.shape[-1])
        latents = jnp.broadcast_to(use(self.latents, x.dtype), (len(x), *self.latents.shape[:1], x.shape[-1]))
        # Latents always see themselves, so that those of no image are numbers too.
        seen = jnp.concatenate([there, jnp.ones(latents.shape[:2], bool)], 1)[:, None]
        latents, _ = scan_blocks([self.layer], collectives.match(latents, x), None, run, [None], sight=(x, seen))
        return self.norm(latents)


class ResamplerLayer(nnx.Module):
    def __init__(self, w: Weights, model: configs.Model):
        self.context_norm, self.norm = Norm(w, model), Norm(w, model)
        self.attention = Attention(w, model)
        self.feed_norm, self.mlp = Norm(w, model), MLP(w, model)

    def __call__(self, x: Float[Array, "N O W"], positions: None, run: Pass, cache: None,
                 sight: tuple[Float[Array, "N S W"], Bool[Array, "N 1 R"]]) -> tuple[Float[Array, "N O W"], None, None]:
        y, (patches, seen) = self.norm(x), sight
        x = x + self.attention.look(y, run, jnp.concatenate([self.context_norm(patches), y], 1), seen)
        y = self.mlp(collectives.enter(self.feed_norm(x), False), run)
        return x + collectives.leave(y, False), None, None

"""Rotary positions (arXiv 2104.09864) and the ways to stretch them beyond the lengths of training."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from moejax import config as configs
from moejax.model.layers import Places


def rotary(x: Float[Array, "B T N H"], positions: Places, model: configs.Model) -> Float[Array, "B T N H"]:
    """x with pair i of its halves turned by position × frequency i."""
    half = x.shape[-1] // 2
    frequency, factor = frequencies(model, 2 * half, positions)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle) * factor, jnp.cos(angle) * factor
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def frequencies(model: configs.Model, size: int, positions: Places) -> tuple[Float[Array, "... 1 1 h"], float]:
    """Of each pair of a head of `size`, theta^(-2i/size) where nothing is scaled; and a factor of sine and cosine."""
    kind, numbers = model.rope()
    share = np.arange(0, size, 2, dtype=np.float32) / size
    if kind == "dynamic":  # NTK-aware, by each sequence's own length so far: beyond the original the base grows
        factor, original = numbers["factor"], numbers["original"]
        length = jnp.maximum(jnp.max(positions, -1).astype(jnp.float32) + 1, original)
        base = model.rope_theta * (factor * length / original - (factor - 1)) ** (size / (size - 2))
        return base[:, None, None, None] ** -jnp.asarray(share)[None, None, None], 1.0
    plain = np.float32(model.rope_theta) ** -share
    scaled, factor = SCALINGS[kind](plain, model.rope_theta, **numbers) if kind else (plain, 1.0)
    return jnp.asarray(scaled, jnp.float32)[None, None, None], factor


def linear(plain: np.ndarray, theta: float, factor: float) -> tuple[np.ndarray, float]:
    """Position interpolation (arXiv 2306.15595)."""
    return plain / factor, 1.0


def llama3(plain: np.ndarray, theta: float, factor: float, low: float, high: float,
           original: float) -> tuple[np.ndarray, float]:
    """Llama 3.1's: waves longer than original / low are stretched, up to original / high less and less."""
    turns = original * plain / (2 * math.pi)  # within the original length
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (keep + (1 - keep) / factor), 1.0


def yarn(plain: np.ndarray, theta: float, factor: float, original: float, fast: float = 32, slow: float = 1,
         attention: float | None = None, truncate: float = 1) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071 section 3): pairs that turn more than `fast` times within the original length are kept,
    those that turn less than `slow` times are stretched; attention is sharpened by a factor on sine and cosine.
    """
    half = len(plain)

    def pair(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    begin, end = (math.floor(pair(fast)), math.ceil(pair(slow))) if truncate else (pair(fast), pair(slow))
    begin, end = max(begin, 0), min(end, 2 * half - 1)
    stretch = np.clip((np.arange(half, dtype=np.float32) - begin) / (end - begin or 0.001), 0, 1)
    return plain * (1 - stretch) + plain / factor * stretch, yarn_factor(factor) if attention is None else attention


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """arXiv 2309.00071 equation 22."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


SCALINGS = {"linear": linear, "llama3": llama3, "yarn": yarn}

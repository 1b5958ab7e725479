"""Learning rates by step."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array

from moejax import config as configs


def cosine(o: configs.Optimizer, steps: int) -> optax.Schedule:
    """Down a half cosine to final_lr at the last step."""
    return optax.cosine_decay_schedule(o.lr, max(steps - o.warmup, 1), o.final_lr)


def wsd(o: configs.Optimizer, steps: int) -> optax.Schedule:
    """Warmup, stable, decay (arXiv 2404.06395): constant, then linearly to final_lr over the last steps."""
    down = max(round(o.decay * steps), 1)
    return optax.linear_schedule(o.lr, o.lr * o.final_lr, down, max(steps - down - o.warmup, 0))


def rsqrt(o: configs.Optimizer, steps: int) -> optax.Schedule:
    """lr × sqrt(warmup / step), as of T5 (arXiv 1910.10683)."""
    start = max(o.warmup, 1)
    return lambda step: o.lr * jnp.sqrt(start / (start + step))


SCHEDULES: dict[str, Callable[[configs.Optimizer, int], optax.Schedule]] = {
    "cosine": cosine, "wsd": wsd, "rsqrt": rsqrt}


def schedule(o: configs.Optimizer, steps: int) -> Callable[[Array], Array]:
    """step (from 0) -> learning rate; the warmup's first step is lr / warmup and reaches lr at step warmup - 1."""
    rest = SCHEDULES[o.schedule](o, steps)

    def rate(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        after = rest(jnp.maximum(step - o.warmup, 0))
        return jnp.where(step < o.warmup, o.lr * (step + 1) / o.warmup, after) if o.warmup else after

    return rate

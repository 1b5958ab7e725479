"""Optimizers: optax's own, told by the axes of the weights what to decay and what to orthogonalise; learning rates."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array
from optax import contrib

from moejax import config as configs
from moejax.parallel.axes import names

Axes = dict[str, str]  # weight name -> its axes


def matrices(axes: Axes) -> dict[str, bool]:
    """Weights that sum over an axis; norms and biases do not."""
    return {name: "->" in text for name, text in axes.items()}


def adamw(o: configs.Optimizer, rate: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    return optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=matrices(axes))


def adafactor(o: configs.Optimizer, rate: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    """arXiv 1804.04235 without momentum; decay is scaled by the learning rate as in AdamW."""
    return decayed(optax.adafactor(None, multiply_by_parameter_scale=False, eps=1e-30), o, rate, axes)


def muon(o: configs.Optimizer, rate: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    """Muon on hidden matrices, each by itself, at AdamW's update size (arXiv 2502.16982); AdamW on everything else."""
    rule = contrib.muon(1.0, eps=o.eps, adam_b1=o.b1, adam_b2=o.b2, consistent_rms=0.2,
                        muon_weight_dimension_numbers={name: dimensions(text) for name, text in axes.items()})
    return decayed(rule, o, rate, axes)


def decayed(rule: optax.GradientTransformation, o: configs.Optimizer, rate: optax.Schedule,
            axes: Axes) -> optax.GradientTransformation:
    """A rule that descends at rate 1, with the decay of AdamW (optax's own would decay vectors too) and a rate."""
    return optax.chain(rule, optax.scale(-1.0), optax.add_decayed_weights(o.weight_decay, matrices(axes)),
                       optax.scale_by_learning_rate(rate))


def dimensions(axes: str) -> contrib.MuonDimensionNumbers | None:
    if "->" not in axes or "vocab" in axes:
        return None
    before, after = axes.split("->")
    batch = names(before.split(":")[0]) if ":" in before else ()
    every = names(axes)
    source = tuple(i for i, name in enumerate(every) if name in names(before.split(":")[-1]) and name not in batch)
    target = tuple(i for i, name in enumerate(every) if name in names(after) and name != "gate")
    return contrib.MuonDimensionNumbers(source, target)


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}


def make_optimizer(o: configs.Optimizer, steps: int, axes: Axes) -> optax.GradientTransformation:
    """The optimizer of a config for weights with these axes.  Clipping is done by the step, which needs the norm."""
    return OPTIMIZERS[o.name](o, learning_rate(o, steps), axes)


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


SCHEDULES = {"cosine": cosine, "wsd": wsd, "rsqrt": rsqrt}


def learning_rate(o: configs.Optimizer, steps: int) -> Callable[[Array], Array]:
    """step (from 0) -> learning rate; the warmup's first step is lr / warmup and reaches lr at step warmup - 1."""
    rest = SCHEDULES[o.schedule](o, steps)

    def rate(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        after = rest(jnp.maximum(step - o.warmup, 0))
        return jnp.where(step < o.warmup, o.lr * (step + 1) / o.warmup, after) if o.warmup else after

    return rate

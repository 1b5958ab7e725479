"""Learning rates at points computed by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

from moejax.config import Optimizer
from moejax.train.optimizer import learning_rate


def rates(steps: int, *at: int, **changes) -> list[float]:
    rate = learning_rate(Optimizer(**{"lr": 8.0, "final_lr": 0.25, "warmup": 4} | changes), steps)
    return [float(rate(jnp.int32(step))) for step in at]


@pytest.mark.parametrize("name", ["cosine", "wsd", "rsqrt"])
def test_warmup_is_a_line_from_its_first_part_to_lr(name):
    # 8 × (step + 1) / 4, and lr again at the step after the warmup
    assert rates(24, 0, 1, 2, 3, 4, schedule=name) == [2, 4, 6, 8, 8]
    assert rates(24, 0, schedule=name, warmup=0) == [8]
    assert rates(24, 0, 1, schedule=name, warmup=1) == [8, 8]
    # a run that ends within its warmup stays on the line
    assert rates(3, 0, 1, 2, schedule=name) == [2, 4, 6]


def test_cosine():
    # 20 steps after the warmup from 8 down to 2: a third of the way is 2 + 6 × (1 + cos 60°) / 2 = 6.5
    assert rates(28, 4, 12, 16, 28, 1000) == pytest.approx([8, 6.5, 5, 2, 2], rel=1e-6)
    # the last step that is taken, 27, is one short of the end: 2 + 6 × (1 + cos(23/24 × 180°)) / 2
    assert rates(28, 27) == pytest.approx([2 + 3 * (1 + math.cos(23 / 24 * math.pi))], rel=1e-5)
    assert rates(24, 0, 8, 12, 24, warmup=0) == pytest.approx([8, 6.5, 5, 2], rel=1e-6)
    # steps <= warmup: nothing to go down over, and no division by zero
    assert rates(4, 3) == [8] and rates(2, 1) == [4]


def test_wsd():
    # constant until the last half of 24 steps, then 12 equal steps of 6 / 12 from 8 to 2
    assert rates(24, 4, 8, 12, 13, 18, 23, 24, 99, schedule="wsd", decay=0.5) == [8, 8, 8, 7.5, 5, 2.5, 2, 2]
    assert rates(24, 0, 12, 18, 24, schedule="wsd", decay=0.5, warmup=0) == [8, 8, 5, 2]
    # more decay than there is after the warmup: it begins at once and is cut off
    assert rates(8, 3, 4, 6, 7, schedule="wsd", decay=0.75) == [8, 8, 6, 5]
    assert rates(24, 23, 24, schedule="wsd", decay=0.0) == [8, 2]


def test_rsqrt():
    # 8 × sqrt(4 / step): at 16 half of it, at 64 a quarter; it knows no last step and no final_lr
    assert rates(24, 4, 16, 64, 400, schedule="rsqrt") == pytest.approx([8, 4, 2, 0.8])
    assert rates(9999, 4, 16, 64, 400, schedule="rsqrt") == pytest.approx([8, 4, 2, 0.8])
    # without a warmup 8 × sqrt(1 / (step + 1))
    assert rates(24, 0, 3, 15, schedule="rsqrt", warmup=0) == pytest.approx([8, 4, 2])


@pytest.mark.parametrize("name", ["cosine", "wsd", "rsqrt"])
def test_it_is_smooth_traceable_and_positive(name):
    steps = jnp.arange(24)
    found = jax.jit(jax.vmap(learning_rate(Optimizer(lr=8.0, warmup=4, schedule=name), 24)))(steps)
    assert found.dtype == jnp.float32
    assert bool(jnp.all((found > 0) & (found <= 8)))
    assert bool(jnp.all(jnp.diff(found[3:]) <= 1e-6))  # only down after the warmup

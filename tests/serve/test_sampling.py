"""The next token: what is likeliest, how often each comes, and among which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.serve import sampling

sample = jax.jit(sampling.sample)
P = np.array([0.15, 0.5, 0.05, 0.3])  # not in order
N = 20_000


def draws(temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """How often each token was drawn, in N draws with a key each."""
    logits = jnp.broadcast_to(jnp.log(jnp.float32(P)) + 3.0, (N, 4))
    keys = jax.random.split(jax.random.key(seed), N)
    tokens = sample(logits, jnp.float32(temperature), jnp.float32(top_p), keys)
    assert tokens.dtype == jnp.int32 and tokens.shape == (N,)
    return np.bincount(tokens, minlength=4)


def assert_drawn(counts: np.ndarray, p: np.ndarray) -> None:
    """Each count within 5 standard deviations of the binomial, sqrt(N p (1 - p)): one in 10^6 fails by chance."""
    np.testing.assert_array_less(np.abs(counts - N * p), 5 * np.sqrt(N * p * (1 - p)) + 1e-9)


def test_greedy_is_the_likeliest_and_the_first_among_equals():
    logits = jnp.array([[0.0, 2.0, 1.0], [5.0, 5.0, 5.0], [-3.0, -9.0, -1.0], [0.0, 7.0, 7.0]])
    keys = jax.random.split(jax.random.key(0), 4)
    for top_p in (1.0, 0.1):
        found = sample(logits, jnp.float32(0), jnp.float32(top_p), keys)
        np.testing.assert_array_equal(found, [1, 0, 2, 1])
    np.testing.assert_array_equal(draws(0.0, 1.0), [0, N, 0, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_softmax_says(temperature):
    p = P ** (1 / temperature)
    assert_drawn(draws(temperature, 1.0), p / p.sum())


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even():
    np.testing.assert_array_equal(draws(1e-9, 1.0), [0, N, 0, 0])
    assert_drawn(draws(1e9, 1.0), np.full(4, 0.25))


@pytest.mark.parametrize("top_p, kept", [
    (1e-6, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.94, [0, 1, 3]),
    (0.96, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_the_nucleus_is_the_fewest_that_reach_top_p(top_p, kept):
    """In order the tokens have 0.5, 0.3, 0.15 and 0.05: sums of 0.5, 0.8, 0.95 and 1."""
    p = np.where(np.isin(np.arange(4), kept), P, 0)
    counts = draws(1.0, top_p, seed=1)
    np.testing.assert_array_equal(counts > 0, p > 0)
    assert_drawn(counts, p / p.sum())


def test_the_nucleus_is_taken_after_the_temperature():
    # at temperature 0.5 the likeliest has 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025) = 0.685
    np.testing.assert_array_equal(draws(0.5, 0.68) > 0, [False, True, False, False])
    np.testing.assert_array_equal(draws(0.5, 0.69) > 0, [False, True, False, True])


def test_a_draw_is_a_function_of_its_own_row():
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 6)
    options = jnp.float32(1.0), jnp.float32(0.9)
    whole, order = np.asarray(sample(logits, *options, keys)), np.array([4, 2, 0, 5, 3, 1])
    np.testing.assert_array_equal(sample(logits[order], *options, keys[order]), whole[order])
    # one row's logits with many keys, and with one key many times
    same = np.broadcast_to(logits[0], (6, 50))
    assert len(set(sample(same, *options, keys).tolist())) > 2
    assert len(set(sample(same, *options, keys[np.zeros(6, int)]).tolist())) == 1

"""Rotary positions and their scalings against formulas in float64, written out here from the papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as configs
from moejax.model.rotary import frequencies, rotary

HUNDRED = configs.Model(rope_theta=100.0)
SIZE, THETA = 16, 10_000.0
PLAIN = THETA ** -(np.arange(0, SIZE, 2) / SIZE)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)  # a few roundings of float32


def scaled(text: str, positions=((0, 1),)) -> tuple[np.ndarray, float]:
    """(frequencies [B or 1, pairs], the factor on sine and cosine)."""
    model = configs.Model(rope_theta=THETA, rope_scaling=text)
    frequency, factor = frequencies(model, SIZE, jnp.asarray(positions, jnp.int32))
    assert frequency.dtype == jnp.float32 and frequency.shape[1:] == (1, 1, SIZE // 2)
    return np.asarray(frequency)[:, 0, 0], factor


def exact(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6)  # relative: the slowest pairs turn by 1e-4 a position


def test_rotary_by_hand():
    # H = 4, theta = 100: pair 0 (x0, x2) turns by 1 a position, pair 1 (x1, x3) by 100^(-1/2) = 0.1.
    x = jnp.asarray([[[[1., 0., 0., 0.]], [[0., 2., 0., 0.]], [[0., 0., 3., 0.]]]])
    y = rotary(x, jnp.asarray([[0, 1, 2]], jnp.int32), HUNDRED)
    close(y[0, 0, 0], [1, 0, 0, 0])
    close(y[0, 1, 0], [0, 2 * math.cos(.1), 0, 2 * math.sin(.1)])
    close(y[0, 2, 0], [-3 * math.sin(2), 0, 3 * math.cos(2), 0])


@pytest.mark.parametrize("scaling", ["", "linear factor=4", "yarn factor=4 original=32"])
def test_rotary_products_depend_on_distance_alone(scaling: str):
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))
    model = configs.Model(rope_scaling=scaling)

    def product(at: int, back: int) -> float:
        turn = [rotary(v, jnp.full((1, 1), p, jnp.int32), model) for v, p in ((q, at), (k, at - back))]
        return float(jnp.vdot(*turn))

    for back in (0, 1, 5):
        np.testing.assert_allclose([product(at, back) for at in (5, 6, 500)], product(40, back), atol=1e-4)  # 500 × eps
    assert abs(product(9, 1) - product(9, 2)) > 1e-2


def test_rotary_turns_each_sequence_by_its_own_positions():
    x = jnp.ones((2, 3, 2, 4))
    positions = jnp.asarray([[0, 1, 2], [7, 8, 9]], jnp.int32)
    both = rotary(x, positions, HUNDRED)
    for row in range(2):
        assert np.array_equal(both[row:row + 1], rotary(x[:1], positions[row:row + 1], HUNDRED))
    assert rotary(x.astype(jnp.bfloat16), positions, HUNDRED).dtype == jnp.bfloat16


def test_nothing_is_scaled_by_default():
    frequency, factor = scaled("")
    exact(frequency[0], PLAIN)
    assert factor == 1


def test_linear_divides_positions():
    frequency, factor = scaled("linear factor=2.5")
    exact(frequency[0], PLAIN / 2.5)
    assert factor == 1
    # What stands at 5 is turned as what stood at 2.
    x, model = jnp.ones((1, 1, 1, SIZE)), configs.Model(rope_scaling="linear factor=2.5")
    at_five = rotary(x, jnp.full((1, 1), 5, jnp.int32), model)
    close(at_five, rotary(x, jnp.full((1, 1), 2, jnp.int32), configs.Model()))


def test_dynamic_grows_the_base_with_each_sequences_own_length():
    """Lengths 8 (the original), 3 and 20 so far; the third alone is beyond the original."""
    rows = [np.arange(a, a + 3) for a in (5, 0, 17)]
    frequency, factor = scaled("dynamic factor=4 original=8", rows)
    assert factor == 1
    exact(frequency[0], PLAIN)
    exact(frequency[1], PLAIN)
    # theta × (4 × 20 / 8 - 3)^(16 / 14) = theta × 7^(8 / 7)
    exact(frequency[2], (THETA * 7 ** (8 / 7)) ** -(np.arange(0, 16, 2) / 16))
    assert frequency[2, 0] == 1  # the fastest pair stays
    # The last of the 20 tokens sees the same alone, with the others in the cache.
    exact(scaled("dynamic factor=4 original=8", [[19]])[0][0], frequency[2])


def test_dynamic_turns_by_those_frequencies():
    x = jnp.ones((2, 3, 1, SIZE))
    positions = jnp.asarray([[0, 1, 2], [17, 18, 19]], jnp.int32)
    y = rotary(x, positions, configs.Model(rope_scaling="dynamic factor=4 original=8"))
    for row, base in enumerate((THETA, THETA * 7 ** (8 / 7))):
        angle = np.asarray(positions)[row, :, None] * base ** -(np.arange(0, 16, 2) / 16)
        want = np.concatenate([np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)], -1)
        np.testing.assert_allclose(y[row, :, 0], want, atol=1e-5)  # angles of up to 19 radians, in float32


def test_llama3_has_three_zones():
    """Pair i turns original × frequency / 2π times: of 1000 tokens 159, 50, 15.9, 5.0, 1.6, .50, .16 and .05 times."""
    frequency, factor = scaled("llama3 factor=8 low=1 high=4 original=1000")
    want = []
    for plain in PLAIN:
        wavelength = 2 * math.pi / plain
        if wavelength < 1000 / 4:
            want.append(plain)
        elif wavelength > 1000 / 1:
            want.append(plain / 8)
        else:
            smooth = (1000 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * plain / 8 + smooth * plain)
    exact(frequency[0], want)
    assert factor == 1
    ratio = frequency[0] / PLAIN
    np.testing.assert_allclose(ratio[[0, 1, 2, 3, 5, 6, 7]], [1, 1, 1, 1, 1 / 8, 1 / 8, 1 / 8], rtol=2e-6)
    # pair 4: 1000 × 10000^(-1/2) / 2π = 10 / 2π = 1.5915 turns, a share of .1972 is kept: .1972 + .8028 / 8
    np.testing.assert_allclose(ratio[4], .29751, rtol=1e-4)


@pytest.mark.parametrize(("numbers", "begin", "end"), [
    # Pairs that turn n times within 500 tokens: 8 × ln(500 / 2πn) / ln(10000): .79128 for 32, 3.80158 for 1.
    ("", 0, 4),  # floor and ceiling
    ("truncate=1", 0, 4),
    ("truncate=0", .79128, 3.80158),
    ("fast=8 slow=2 truncate=0", 1.99540, 3.19953),
    ("fast=8 slow=2", 1, 4),
    ("fast=100 truncate=0", 0, 3.80158),  # -.20 is before the first pair
])
def test_yarn_goes_from_the_kept_to_the_stretched(numbers: str, begin: float, end: float):
    frequency, _ = scaled(f"yarn factor=4 original=500 {numbers}")
    stretched = np.clip((np.arange(8) - begin) / (end - begin), 0, 1)
    np.testing.assert_allclose(frequency[0], PLAIN * (1 - stretched) + PLAIN / 4 * stretched, rtol=1e-4)
    assert frequency[0, -1] < .26 * PLAIN[-1]


def test_yarn_of_a_ramp_without_width():
    """Both ends are pair 2: those up to it are kept."""
    turns = 500 * PLAIN[2] / 2 / math.pi
    frequency, _ = scaled(f"yarn factor=4 original=500 fast={turns} slow={turns} truncate=0")
    exact(np.delete(frequency[0] / PLAIN, 2), [1, 1, .25, .25, .25, .25, .25])


@pytest.mark.parametrize(("numbers", "factor"), [
    ("factor=4", .1 * math.log(4) + 1), ("factor=40", 1.3688879), ("factor=1", 1), ("factor=0.5", 1),
    ("factor=4 attention=1.25", 1.25), ("factor=4 attention=1", 1)])
def test_yarn_sharpens_attention_by_a_factor_on_sine_and_cosine(numbers: str, factor: float):
    text = f"yarn original=500 {numbers}"
    frequency, found = scaled(text)
    np.testing.assert_allclose(found, factor, rtol=1e-7)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, SIZE)), jnp.float32)
    y = rotary(x, jnp.full((1, 1), 3, jnp.int32), configs.Model(rope_theta=THETA, rope_scaling=text))
    np.testing.assert_allclose(np.linalg.norm(y), factor * np.linalg.norm(x), rtol=1e-6)
    angle, (a, b) = 3 * frequency[0], np.asarray(x).reshape(2, 8)
    close(y[0, 0, 0], factor * np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                                               b * np.cos(angle) + a * np.sin(angle)]))

"""Optimizers on small arrays with the axes of a model: what decays, which way weights go, what is orthogonalised."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from optax import apply_updates
from optax.contrib import MuonDimensionNumbers

from moejax import config as configs
from moejax.config import Mesh
from moejax.parallel.axes import spec
from moejax.parallel.mesh import make_mesh
from moejax.train.optimizer import OPTIMIZERS, dimensions, make_optimizer, matrices

AXES = {
    "embedding": "vocab -> embed", "head": "embed -> vocab", "norm": "norm", "norms": "layer norm",
    "q": "layer: embed -> heads head", "o": "layer: heads head -> embed", "router": "layer: embed -> choice",
    "up": "layer expert: embed -> gate hidden", "down": "layer expert: hidden -> embed"}
SIZES = {"vocab": 10, "embed": 4, "norm": 4, "layer": 2, "heads": 2, "head": 6, "choice": 2, "expert": 2, "gate": 2,
         "hidden": 6}
SHAPES = {name: tuple(SIZES[each] for each in text.replace(":", "").replace("->", "").split())
          for name, text in AXES.items()}
HIDDEN = ("q", "o", "router", "up", "down")  # what Muon orthogonalises


def draw(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * random.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


@cache
def made(name: str, decay: float = 0.0, lr: float = 0.1):
    """The optimizer with a constant rate."""
    o = configs.Optimizer(name=name, lr=lr, warmup=0, final_lr=1.0, weight_decay=decay)
    return make_optimizer(o, 1000, AXES)


def step(optimizer, weights, gradients, state=None):
    state = optimizer.init(weights) if state is None else state
    updates, state = jax.jit(optimizer.update)(gradients, state, weights)
    return apply_updates(weights, updates), state


def test_matrices_are_what_sums_over_an_axis():
    assert matrices(AXES) == {name: name not in ("norm", "norms") for name in AXES}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_on_matrices_only_and_follows_the_rate(name):
    weights = draw(0)
    new, _ = step(made(name, 0.5), weights, jax.tree.map(jnp.zeros_like, weights))
    for each, old in weights.items():
        # without a gradient all that happens is -rate × decay × weight: × (1 - 0.1 × 0.5)
        expected = old * (1.0 if each in ("norm", "norms") else 0.95)
        np.testing.assert_allclose(new[each], expected, rtol=1e-6, err_msg=each)


def test_adamw_by_hand():
    """Algorithm 2 of arXiv 1711.05101 in numpy, for three steps of a schedule."""
    o = configs.Optimizer(name="adamw", lr=0.1, warmup=2, schedule="wsd", decay=0.0, b1=0.8, b2=0.9, eps=1e-3,
                          weight_decay=0.3)
    optimizer = make_optimizer(o, 100, AXES)
    weights = draw(0)
    state = optimizer.init(weights)
    expected = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    m, v = ({name: np.zeros(value.shape) for name, value in weights.items()} for _ in range(2))
    for t, rate in ((1, 0.05), (2, 0.1), (3, 0.1)):
        gradients = draw(t)
        weights, state = step(optimizer, weights, gradients, state)
        for name in AXES:
            g = np.asarray(gradients[name], np.float64)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            direction = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-3)
            decay = 0.0 if name in ("norm", "norms") else 0.3 * expected[name]
            expected[name] = expected[name] - rate * (direction + decay)
            np.testing.assert_allclose(weights[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_adafactor_by_hand():
    """arXiv 1804.04235 without factors (all here are small): g / sqrt(v), clipped to an RMS of 1."""
    weights = draw(0)
    optimizer = made("adafactor", 0.5)
    first, second = draw(1), draw(2)
    new, state = step(optimizer, weights, first)
    for name, old in weights.items():
        # v starts as the squares of the first gradient, so the first step is its sign
        decay = 0.0 if name in ("norm", "norms") else 0.5 * old
        np.testing.assert_allclose(new[name], old - 0.1 * (jnp.sign(first[name]) + decay), rtol=1e-5, err_msg=name)
    newer, _ = step(optimizer, new, second, state)
    for name, old in new.items():
        rho = 1 - 2**-0.8
        u = second[name] / jnp.sqrt(rho * first[name]**2 + (1 - rho) * second[name]**2)
        u = u / max(1.0, float(jnp.sqrt(jnp.mean(u**2))))
        decay = 0.0 if name in ("norm", "norms") else 0.5 * old
        np.testing.assert_allclose(newer[name], old - 0.1 * (u + decay), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_downhill(name):
    """Squared distance to a goal: every weight comes closer, with either sign of the way."""
    goal, weights = draw(1), draw(2)
    optimizer, state = made(name), None
    start = {each: float(jnp.sum((weights[each] - goal[each])**2)) for each in AXES}
    for _ in range(20):
        gradients = {each: weights[each] - goal[each] for each in AXES}
        weights, state = step(optimizer, weights, gradients, state)
    for each in AXES:
        # AdamW moves each by up to 0.1 a step; Muon by 0.02 on average, of distances of about 1.4
        assert float(jnp.sum((weights[each] - goal[each])**2)) < 0.7 * start[each], each


@pytest.mark.parametrize("axes, source, target", [
    ("embed -> heads head", (0,), (1, 2)), ("heads head -> embed", (0, 1), (2,)),
    ("layer: embed -> kv head", (1,), (2, 3)), ("layer: embed -> choice", (1,), (2,)),
    ("expert: embed -> gate hidden", (1,), (3,)), ("layer expert: embed -> gate hidden", (2,), (4,)),
    ("layer expert: hidden -> embed", (2,), (3,))])
def test_dimensions_of_a_matrix(axes, source, target):
    """Layers, experts and the two gates are batches of matrices; heads join into one side."""
    assert dimensions(axes) == MuonDimensionNumbers(source, target)


@pytest.mark.parametrize("axes", ["vocab -> embed", "embed -> vocab", "norm", "layer norm", "layer choice"])
def test_embedding_head_and_vectors_are_not_orthogonalised(axes):
    assert dimensions(axes) is None


def by_matrix(name: str, array: jax.Array) -> np.ndarray:
    """Every matrix of a hidden weight on its own, [count rows columns]."""
    array = np.asarray(array)
    if name == "up":
        return array.transpose(0, 1, 3, 2, 4).reshape(8, 4, 6)
    rows = {"q": 4, "o": 12, "router": 4, "down": 6}[name]
    return array.reshape(4 if name == "down" else 2, rows, -1)


def test_muon_makes_every_layer_and_expert_orthogonal_at_adamws_size():
    """Newton-Schulz brings the singular values of each matrix near 1; the update is -rate × 0.2 × sqrt(longer side)."""
    weights, gradients = draw(0), draw(1)
    new, _ = step(made("muon"), weights, gradients)
    for name in HIDDEN:
        moved = by_matrix(name, (new[name] - weights[name]) / -0.1)
        for update, gradient in zip(moved, by_matrix(name, gradients[name]), strict=True):
            size = 0.2 * max(update.shape)**0.5
            values = np.linalg.svd(update, compute_uv=False) / size
            assert np.all((values > 0.6) & (values < 1.3)), (name, values)  # 5 iterations end in 0.68..1.13 or so
            u, _, v = np.linalg.svd(gradient, full_matrices=False)
            aligned = np.sum(update * (u @ v)) / np.linalg.norm(update) / np.linalg.norm(u @ v)
            assert aligned > 0.95, (name, aligned)  # downhill, along the nearest orthogonal matrix


def test_muon_experts_and_layers_do_not_know_one_another():
    weights, gradients = draw(0), draw(1)
    other = dict(gradients)
    for name in ("up", "down"):
        other[name] = gradients[name].at[1, 0].multiply(100.0)
    for name in ("q", "o", "router"):
        other[name] = gradients[name].at[1].multiply(100.0).at[1, 0].add(1.0)
    one, _ = step(made("muon"), weights, gradients)
    two, _ = step(made("muon"), weights, other)
    for name in ("up", "down"):
        same = np.array([[True, True], [False, True]])
        np.testing.assert_array_equal(one[name][same], two[name][same], err_msg=name)
    for name in ("q", "o", "router"):
        np.testing.assert_array_equal(one[name][0], two[name][0], err_msg=name)
        assert np.any(one[name][1] != two[name][1])


def test_muon_an_expert_without_tokens_stays():
    weights, gradients = draw(0), draw(1)
    gradients["up"] = gradients["up"].at[0, 1].set(0.0)
    new, _ = step(made("muon"), weights, gradients)
    np.testing.assert_array_equal(new["up"][0, 1], weights["up"][0, 1])
    assert all(bool(jnp.all(jnp.isfinite(value))) for value in new.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_change_no_numbers(name):
    mesh = Mesh(fsdp=2, expert=2, tensor=2)
    devices = make_mesh(mesh)
    weights, gradients = draw(0), [draw(1), draw(2)]
    place = {each: NamedSharding(devices, spec(AXES[each], SHAPES[each], devices.shape)) for each in AXES}
    optimizer = made(name)
    one, many, state, states = weights, jax.device_put(weights, place), None, None
    for each in gradients:
        one, state = step(optimizer, one, each, state)
        many, states = step(optimizer, many, jax.device_put(each, place), states)
    for each in AXES:
        assert many[each].sharding.is_equivalent_to(place[each], len(SHAPES[each]))
        # float32 sums of up to 24 numbers in another order, through five iterations
        np.testing.assert_allclose(many[each], one[each], rtol=1e-4, atol=1e-5, err_msg=each)

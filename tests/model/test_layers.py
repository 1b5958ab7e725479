"""Norms, rotary positions, activations and the dense layer against their formulas in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import layers, weights
from moejax.model.layers import ACTIVATIONS, Pass
from moejax.model.rotary import rotary

MODEL = configs.Model(d_model=4, hidden=6, activation="swiglu", norm_eps=0.5)
HUNDRED = configs.Model(rope_theta=100.0)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)  # a few roundings of float32


def norm(kind: str, x, scale=(1, 1, 1, 1)):
    model = configs.dataclasses.replace(MODEL, norm=kind)
    layer = layers.Norm(weights.Weights(model, jax.random.key(0)), model)
    assert layer.scale[...].tolist() == [1, 1, 1, 1]  # to start with
    return weights.assemble(layer, {"scale": jnp.asarray(scale, jnp.float32)})(x)


def test_rmsnorm_by_hand():
    # mean of squares (1 + 9 + 4 + 4) / 4 = 4.5, + 0.5 is 5
    y = norm("rmsnorm", jnp.asarray([[[1., 3., -2., 2.]]]), (1, 2, 3, 4))
    close(y, np.array([[[1, 6, -6, 8]]]) / math.sqrt(5))


def test_layernorm_by_hand():
    # mean 1, centred [0, 2, -3, 1], mean of squares 14 / 4 = 3.5, + 0.5 is 4
    y = norm("layernorm", jnp.asarray([[[1., 3., -2., 2.]]]), (1, 2, 3, 4))
    close(y, [[[0, 2, -4.5, 2]]])


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_compute_in_float32(kind: str):
    # In bfloat16, 256² + 1² would round to 256², and a mean of 100.5 to 100.
    x = np.array([[[100, 101, 100, 101], [256, 1, 1, 1]]])
    y = norm(kind, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    centred = x - x.mean(-1, keepdims=True) * (kind == "layernorm")
    want = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + .5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)  # the output's one rounding


def test_rotary_by_hand():
    # H = 4, theta = 100: pair 0 (x0, x2) turns by 1 a position, pair 1 (x1, x3) by 100^(-1/2) = 0.1.
    x = jnp.asarray([[[[1., 0., 0., 0.]], [[0., 2., 0., 0.]], [[0., 0., 3., 0.]]]])
    y = rotary(x, jnp.asarray([[0, 1, 2]], jnp.int32), HUNDRED)
    close(y[0, 0, 0], [1, 0, 0, 0])
    close(y[0, 1, 0], [0, 2 * math.cos(.1), 0, 2 * math.sin(.1)])
    close(y[0, 2, 0], [-3 * math.sin(2), 0, 3 * math.cos(2), 0])


def test_rotary_products_depend_on_distance_alone():
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))

    def product(at: int, back: int) -> float:
        turn = [rotary(v, jnp.full((1, 1), p, jnp.int32), MODEL) for v, p in ((q, at), (k, at - back))]
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


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("name", "formula"), [
    ("gelu", lambda a: tanh_gelu(a[:, 0])),
    ("swiglu", lambda a: a[:, 0] / (1 + np.exp(-a[:, 0])) * a[:, 1]),
    ("geglu", lambda a: tanh_gelu(a[:, 0]) * a[:, 1]),
])
def test_activations(name: str, formula):
    gates = np.random.default_rng(0).normal(size=(5, 1 if name == "gelu" else 2, 7)) * 3
    close(ACTIVATIONS[name](jnp.asarray(gates, jnp.float32)), formula(gates))


def test_every_activation_of_the_config_exists():
    assert set(ACTIVATIONS) == set(configs.typing.get_args(configs.typing.get_type_hints(configs.Model)["activation"]))


@pytest.mark.parametrize(("mesh", "sequence"), [
    (configs.Mesh(), False), (configs.Mesh(tensor=3), False), (configs.Mesh(tensor=3), True)])
def test_a_dense_layer_is_two_matmuls_on_any_mesh(inside, made, mesh: configs.Mesh, sequence: bool):
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass(sequence=sequence))[0]

    layer, values = made(layers.DenseLayer, MODEL)
    x = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    split = "tensor" if mesh.tensor > 1 else None
    slices = P(None, split if sequence else None)
    y = inside(run, values, x, mesh=mesh, after=slices,
               before=({"mlp.up": P(None, None, split), "mlp.down": P(split)}, slices))
    up, down = (np.asarray(values[f"mlp.{name}"], np.float64) for name in ("up", "down"))
    close(y, (x @ up[:, 0] / (1 + np.exp(-x @ up[:, 0])) * (x @ up[:, 1])) @ down)

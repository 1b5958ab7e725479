"""Norms, activations and the dense layer against their formulas in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import layers, weights
from moejax.model.layers import ACTIVATIONS, Pass

MODEL = configs.Model(d_model=4, hidden=6, activation="swiglu", norm_eps=0.5)


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
def test_a_norm_may_have_a_bias(kind: str):
    model = configs.dataclasses.replace(MODEL, norm=kind, biases=("norm",))
    layer = layers.Norm(weights.Weights(model, jax.random.key(0)), model)
    assert layer.bias[...].tolist() == [0, 0, 0, 0]  # to start with
    y = weights.assemble(layer, {"scale": jnp.arange(1., 5), "bias": jnp.asarray([.5, 0, -1, 2])})(
        jnp.asarray([[[1., 3., -2., 2.]]]))
    # as above, scaled, and the bias after the scale
    scaled = np.array([1, 6, -6, 8]) / math.sqrt(5) if kind == "rmsnorm" else np.array([0, 2, -4.5, 2])
    close(y, [[scaled + np.array([.5, 0, -1, 2])]])


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_compute_in_float32(kind: str):
    # In bfloat16, 256² + 1² would round to 256², and a mean of 100.5 to 100.
    x = np.array([[[100, 101, 100, 101], [256, 1, 1, 1]]])
    y = norm(kind, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    centred = x - x.mean(-1, keepdims=True) * (kind == "layernorm")
    want = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + .5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)  # the output's one rounding


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("name", "formula"), [
    ("gelu", lambda a: tanh_gelu(a[:, 0])),
    ("swiglu", lambda a: a[:, 0] / (1 + np.exp(-a[:, 0])) * a[:, 1]),
    ("geglu", lambda a: tanh_gelu(a[:, 0]) * a[:, 1]),
])
def test_activations(name: str, formula):
    gates = np.random.default_rng(0).normal(size=(5, 1 if name == "gelu" else 2, 7)) * 3
    close(ACTIVATIONS[name](*layers.columns(jnp.asarray(gates, jnp.float32))), formula(gates))


def test_clamped_swiglu_by_hand():
    """gate × sigmoid(slope × gate) × (up + 1), gates up to 3 and ups from -3 to 3; the slope is 2."""
    function = layers.activation(configs.Model(activation="clamped_swiglu", clamp=(2.0, 3.0)))
    gate = np.array([1, 3, 3.5, -3, -50, 0, 1, 1, 1, 9], np.float32)
    up = np.array([.5, .5, .5, .5, .5, 7, 3, 3.5, -3.5, -9], np.float32)
    y = function(jnp.asarray(gate), jnp.asarray(up))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    close(y, [sigmoid(2) * 1.5, 3 * sigmoid(6) * 1.5, 3 * sigmoid(6) * 1.5,  # a gate beyond 3 is 3,
              -3 * sigmoid(-6) * 1.5, 0, 0,  # one far below stays and vanishes
              sigmoid(2) * 4, sigmoid(2) * 4, -sigmoid(2) * 2, -3 * sigmoid(6) * 2])
    slopes = jax.grad(lambda h: jnp.sum(function(*layers.columns(h))))(jnp.asarray(np.stack([gate, up])))
    assert not np.any(np.asarray(slopes[0])[gate > 3]) and not np.any(np.asarray(slopes[1])[np.abs(up) > 3])
    # d/dgate of gate × sigmoid(2 gate) × 1.5 at 1: (sigmoid + 2 sigmoid (1 - sigmoid)) × 1.5
    close(slopes[0, 0], 1.5 * (sigmoid(2) + 2 * sigmoid(2) * sigmoid(-2)))
    close(slopes[1, 0], sigmoid(2))


def test_equal_models_have_equal_activations():
    """They are part of what is compiled."""
    model = configs.Model(activation="clamped_swiglu")
    assert layers.activation(model) is layers.activation(configs.Model(activation="clamped_swiglu"))
    assert layers.activation(model).keywords == {"slope": 1.702, "limit": 7.0}
    assert layers.activation(configs.Model()) is layers.ACTIVATIONS["swiglu"]


def test_every_activation_of_the_config_exists():
    assert set(ACTIVATIONS) == set(configs.typing.get_args(configs.typing.get_type_hints(configs.Model)["activation"]))


@pytest.mark.parametrize(("mesh", "sequence", "biases"), [
    (configs.Mesh(), False, ()), (configs.Mesh(tensor=3), False, ("mlp",)), (configs.Mesh(tensor=3), True, ("mlp",))])
def test_a_dense_layer_is_two_matmuls_on_any_mesh(inside, made, mesh: configs.Mesh, sequence: bool, biases: tuple):
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass(sequence=sequence))[0]

    layer, values = made(layers.DenseLayer, configs.dataclasses.replace(MODEL, biases=biases))
    x = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    split = "tensor" if mesh.tensor > 1 else None
    slices = P(None, split if sequence else None)
    places = {"up": P(None, None, split), "down": P(split), "up_bias": P(None, split), "down_bias": P()}
    y = inside(run, values, x, mesh=mesh, after=slices,
               before=({name: places[name.removeprefix("mlp.")] for name in values}, slices))
    up, down, *bias = (np.asarray(values[name], np.float64)
                       for name in ("mlp.up", "mlp.down", "mlp.up_bias", "mlp.down_bias") if name in values)
    assert len(bias) == (2 if biases else 0)
    up_bias, down_bias = bias or (np.zeros((2, 6)), np.zeros(4))
    gate, value = x @ up[:, 0] + up_bias[0], x @ up[:, 1] + up_bias[1]
    close(y, gate / (1 + np.exp(-gate)) * value @ down + down_bias)

"""The MoE layer around routers and dispatchers: groups, jitter, shared experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as configs
from moejax.model import moe as layers, weights
from moejax.model.layers import Pass

B, T, D = 3, 15, 8


@pytest.fixture
def make(made):
    """make(fields of the config): a layer and its weights."""
    def layer(**moe):
        model = configs.Model(d_model=D, hidden=5, moe=configs.MoE(**{"experts": 4, "hidden": 6} | moe))
        return made(layers.MoELayer, model)

    return layer


def x(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


def test_a_group_is_a_piece_of_one_sequence(inside, make):
    """Groups of 5 of 15 tokens decide what sequences of 5 tokens would; the parts come back per sequence."""
    def run(length):
        def device(values, x):
            y, (routing, losses) = weights.assemble(layer, values)(x.reshape(-1, length, D), Pass(training=True))
            return y.reshape(B, T, D), [part.reshape(B, T, -1) for part in routing], losses
        return device

    layer, values = make(group=5, capacity_factor=0.6)
    parts, short = inside(run(T), values, x()), inside(run(5), values, x())
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(short), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    whole, values = make(capacity_factor=0.6)
    layer = whole
    assert not np.array_equal(inside(run(T), values, x())[1][2], parts[1][2])  # queues of 15 are others


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted", "blocked"])
def test_without_drop_every_choice_is_kept(inside, make, dispatcher: str):
    def run(drop):
        return lambda values, x: weights.assemble(layer, values)(x, Pass(training=True, drop=drop))

    layer, values = make(group=5, capacity_factor=0.3, dispatcher=dispatcher)
    _, (routing, losses) = inside(run(True), values, x())
    assert losses.dropped == np.sum(~np.asarray(routing.kept)) > 0
    y, (routing, losses) = inside(run(False), values, x())
    assert np.all(routing.kept) and losses.dropped == 0
    layer, values = make(capacity_factor=None, dispatcher=dispatcher)
    np.testing.assert_allclose(inside(run(True), values, x())[0], y, rtol=1e-5, atol=1e-6)


def test_without_drop_sequences_need_not_be_whole_groups(inside, make):
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass(drop=False))[0]

    layer, values = make(group=5, capacity_factor=0.3)
    np.testing.assert_allclose(inside(run, values, x()[:, :7]), inside(run, values, x())[:, :7], rtol=1e-5, atol=1e-6)


def test_shared_experts_are_a_dense_layer_beside_the_routed_ones(inside, make):
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass())[0]

    layer, values = make(shared=12)
    with_shared = np.asarray(inside(run, values, x()))
    up, down = (np.asarray(values[f"shared.{name}"], np.float64) for name in ("up", "down"))
    assert up.shape == (D, 2, 12) and down.shape == (12, D)  # two experts of width 6, side by side
    layer, alone = make()
    y = np.asarray(inside(run, {name: values[name] for name in alone}, x()))
    gate, value = x() @ up[:, 0], x() @ up[:, 1]
    np.testing.assert_allclose(with_shared, y + (gate / (1 + np.exp(-gate)) * value) @ down, rtol=1e-5, atol=1e-5)


def test_a_gate_scales_the_shared_expert(inside, make):
    """By a sigmoid of one number for each token."""
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass())[0]

    layer, values = make(shared=12, shared_gate=True)
    assert values["shared_gate"].shape == (D, 1)
    gated = np.asarray(inside(run, values, x()))
    layer, plain = make(shared=12)
    with_shared = np.asarray(inside(run, {name: values[name] for name in plain}, x()))
    layer, alone = make()
    without = np.asarray(inside(run, {name: values[name] for name in alone}, x()))
    gate = 1 / (1 + np.exp(-x().astype(np.float64) @ values["shared_gate"]))
    assert gate.shape == (B, T, 1) and gate.std() > .1
    np.testing.assert_allclose(gated, without + gate * (with_shared - without), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["topk", "sigmoid", "sparsemixer", "expert_choice"])
def test_a_routers_bias_is_added_to_its_logits(inside, made, monkeypatch, router: str):
    """Whatever the router; the balancing bias is another thing."""
    def logits(values, x):
        routing, _, _ = weights.assemble(layer, values).decide(x, Pass())
        return seen.pop(), routing.weight

    seen, route = [], layers.route
    monkeypatch.setattr(layers, "route", lambda logits, *rest: seen.append(logits) or route(logits, *rest))

    moe = configs.MoE(experts=4, hidden=6, router=router)
    layer, values = made(layers.MoELayer, configs.Model(d_model=D, moe=moe, biases=("router",)))
    got, weight = inside(logits, values, x())
    np.testing.assert_allclose(got, x() @ values["router"] + values["router_bias"], rtol=1e-5, atol=1e-5)
    zero = values | {"router_bias": np.zeros(4, np.float32)}
    assert not np.allclose(inside(logits, zero, x())[1], weight)


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted", "blocked"])
def test_experts_have_biases_of_their_own(inside, made, dispatcher: str):
    """One expert alone with all tokens is a dense layer with biases."""
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass())[0]

    moe = configs.MoE(experts=1, active=1, hidden=6, dispatcher=dispatcher)
    layer, values = made(layers.MoELayer, configs.Model(d_model=D, moe=moe, biases=("experts",)))
    up, down, up_bias, down_bias = (values[name][0].astype(np.float64) for name in
                                    ("up", "down", "up_bias", "down_bias"))
    gate, value = x() @ up[:, 0] + up_bias[0], x() @ up[:, 1] + up_bias[1]
    want = gate / (1 + np.exp(-gate)) * value @ down + down_bias
    np.testing.assert_allclose(inside(run, values, x()), want, rtol=1e-5, atol=1e-5)


def test_jitter_belongs_to_the_sample(inside, make):
    """The noise of a sample follows from the step's key and the sample's number, not from its place in the batch."""
    layer, _ = make(jitter=0.25, group=5)
    key, rows = jax.random.key(3), jnp.arange(B, dtype=jnp.int32) + 7
    ones = jnp.ones((3 * B, 5, D))

    def noise(key, rows):
        return np.asarray(layer.noise(ones, Pass(key=key, rows=rows))).reshape(B, T, D)

    first = noise(key, rows)
    assert first.min() >= .75 and first.max() <= 1.25
    assert abs(first.mean() - 1) < .03 and first.std() > .13  # uniform: 0.5 / sqrt(12) = .144; 360 draws
    assert np.array_equal(noise(key, rows[::-1]), first[::-1])
    assert np.unique(first).size > .99 * first.size
    assert not np.any(noise(jax.random.key(4), rows) == first)


def test_jitter_moves_routers_in_training_only(inside, make):
    def logits_of(training, layer):
        def device(values, x):
            run = Pass(training=training, key=jax.random.key(0), rows=jnp.arange(B, dtype=jnp.int32))
            return weights.assemble(layer, values).decide(x, run)[0].weight
        return inside(device, values, x())

    jittery, values = make(jitter=0.25, capacity_factor=None)
    still, _ = make(capacity_factor=None)
    assert np.array_equal(logits_of(False, jittery), logits_of(False, still))
    assert not np.array_equal(logits_of(True, jittery), logits_of(True, still))


def test_routers_work_in_float32(inside, make):
    """In bfloat16 the router sees the rounded activations, but neither its weights nor its sums are rounded."""
    def run(values, x):
        return weights.assemble(layer, values)(x, Pass(dtype=jnp.bfloat16))

    layer, values = make(capacity_factor=None)
    rounded = jnp.asarray(x(), jnp.bfloat16)
    y, (routing, losses) = inside(run, values, rounded)
    assert y.dtype == jnp.bfloat16 and routing.weight.dtype == losses.z.dtype == jnp.float32
    logits = np.asarray(rounded, np.float64) @ np.asarray(values["router"], np.float64)
    np.testing.assert_allclose(losses.z, np.mean(np.log(np.sum(np.exp(logits), -1)) ** 2), rtol=1e-5)

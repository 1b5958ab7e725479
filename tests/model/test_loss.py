"""The chunked cross-entropy of a split vocabulary against a log-softmax over all logits at once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import loss
from moejax.model.sharded import Sharded
from moejax.parallel import collectives
from moejax.parallel.mesh import make_mesh

N, D, V = 23, 5, 28


def inputs(dtype=np.float32):
    """(hidden, weight, targets, weights): every third token counts nothing, the others 1 or a half."""
    random = np.random.default_rng(0)
    weights = np.where(np.arange(N) % 3 == 0, 0, np.where(np.arange(N) % 2, 1, .5)).astype(np.float32)
    targets = np.concatenate([[0, V - 1, 6, 7], random.integers(0, V, N - 4)]).astype(np.int32)  # also edges of shards
    hidden, weight = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((N, D), (D, V)))
    return hidden, weight, targets, weights


def naive(hidden, weight, targets, weights, cap=0.0):
    logits = hidden @ weight
    p = jax.nn.log_softmax(cap * jnp.tanh(logits / cap) if cap else logits)
    return -jnp.sum(weights * p[np.arange(N), targets])


def on_mesh(mesh: configs.Mesh, cap: float = 0.0):
    """The loss of global arrays; tokens are split over the batch axes, the vocabulary over `tensor`."""
    def device(hidden, weight, targets, weights):
        mine = loss.cross_entropy(collectives.enter(hidden[None], False)[0], weight, targets, weights, cap)
        return collectives.total(mine, ("data",))

    devices = make_mesh(mesh, jax.devices()[: mesh.devices()])
    rows = P("data") if mesh.data > 1 else P()
    columns = P(None, "tensor") if mesh.tensor > 1 else P()
    return jax.shard_map(device, mesh=devices, in_specs=(rows, columns, rows, rows), out_specs=P())


def both(function, *given):
    """Value and gradients of 3 × the loss, whose factor has to arrive in the gradients."""
    return jax.jit(jax.value_and_grad(lambda *a: 3 * function(*a), (0, 1)))(*given)


@pytest.mark.parametrize("mesh", [configs.Mesh(), configs.Mesh(tensor=4)])
@pytest.mark.parametrize("chunk", [5, 23, 1024])  # 23 tokens: 5 chunks with 2 of padding, 1 chunk, less than a chunk
def test_loss_and_gradients_are_those_of_log_softmax(monkeypatch: pytest.MonkeyPatch, mesh: configs.Mesh, chunk: int):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    for got, want in zip(jax.tree.leaves(both(on_mesh(mesh), *inputs())), jax.tree.leaves(both(naive, *inputs())),
                         strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [configs.Mesh(), configs.Mesh(tensor=2)])
@pytest.mark.parametrize("cap", [.5, 3.0, 1e4])  # most logits far beyond it, some, and none
def test_capped_logits(monkeypatch: pytest.MonkeyPatch, mesh: configs.Mesh, cap: float):
    monkeypatch.setattr(loss, "CHUNK", 5)
    want = both(lambda *given: naive(*given, cap=cap), *inputs())
    for got, one in zip(jax.tree.leaves(both(on_mesh(mesh, cap), *inputs())), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-5, atol=2e-5)  # 1 - tanh² of 1 takes a digit
    if cap > 1e3:
        np.testing.assert_allclose(want[0], both(naive, *inputs())[0], rtol=1e-5)


def test_a_cap_bounds_what_can_be_lost():
    hidden, weight, targets, weights = inputs()
    value = on_mesh(configs.Mesh(tensor=2), 2.0)(hidden * 1e7, weight, targets, weights)
    # logits are 2 or -2: at most 27 of e^2 against one of e^-2
    assert 0 < value < weights.sum() * math.log(27 * math.exp(4) + 1)
    # every logit is ±2, so the number of positive ones says all
    signs = np.sign(np.asarray(hidden) @ np.asarray(weight))
    total = np.log(np.exp(2 * signs).sum(-1)) - 2 * signs[np.arange(N), targets]
    np.testing.assert_allclose(value, np.sum(weights * total), rtol=1e-5)


@pytest.mark.parametrize("mesh", [configs.Mesh(), configs.Mesh(tensor=2), configs.Mesh(tensor=4, sequence=True)])
@pytest.mark.parametrize("tied", [False, True])
def test_bias_multiplier_and_cap_of_the_logits_together(numbers, mesh: configs.Mesh, tied: bool):
    """Loss and gradients in hidden states, head and bias, against autodiff of all logits; the public logits too."""
    model = configs.Model(layers=1, pattern="D", d_model=6, heads=4, kv_heads=1, head_dim=2, hidden=4, vocab=V,
                          tied=tied, biases=("head",), caps=(0.0, 1.5), multipliers=(3.0, 1.0, 1.0, .7))
    sharded = Sharded(configs.Config(model=model, mesh=mesh), make_mesh(mesh, jax.devices()[: mesh.devices()]))
    random = np.random.default_rng(0)
    hidden = random.normal(size=(2, 12, 6)).astype(np.float32)
    targets = jnp.asarray(random.integers(0, V, (2, 12), dtype=np.int32))
    weights = jnp.asarray(random.random((2, 12), np.float32))
    head = "embedding" if tied else "head"

    def device(values, hidden):
        model, run = sharded.build(values), sharded.run()
        rows, columns = model.output(hidden, run)
        assert columns.shape == (7, V // mesh.tensor)
        value = loss.cross_entropy(rows.reshape(24, -1), columns, targets.reshape(-1), weights.reshape(-1), model.cap)
        return value, model.logits(hidden, run)

    slices = P(None, "tensor") if mesh.sequence else P()
    split = P(None, None, "tensor") if mesh.tensor > 1 else P()
    program = sharded.program(device, (slices,), (P(), split))
    values = numbers(sharded)
    (value, logits), (weight_grads, grads) = jax.jit(jax.value_and_grad(program, (0, 1), has_aux=True))(values, hidden)

    def whole(hidden, head, bias):
        logits = hidden * .7 @ head + bias[None, None]
        logits = 1.5 * jnp.tanh(logits / 1.5)
        hit = jax.nn.one_hot(targets, V)
        return -jnp.sum(weights * jnp.sum(hit * jax.nn.log_softmax(logits), -1)), logits

    given = hidden, np.asarray(values[head].T if tied else values[head]), np.asarray(values["head_bias"])
    (want, want_logits), (d_hidden, d_head, d_bias) = jax.jit(
        jax.value_and_grad(whole, (0, 1, 2), has_aux=True))(*given)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=1e-5)
    for got, one in ((grads, d_hidden), (weight_grads[head].T if tied else weight_grads[head], d_head),
                     (weight_grads["head_bias"], d_bias)):
        np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(one) > .1


def test_tokens_on_several_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    hidden, weight, targets, weights = inputs()
    even = hidden[:22], weight, targets[:22], weights[:22]
    got = both(on_mesh(configs.Mesh(data=2, tensor=2)), *even)
    want = both(naive, hidden, weight, targets, weights * (np.arange(N) < 22))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1][0], want[1][0][:22], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1][1], want[1][1], rtol=1e-5, atol=1e-5)


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary():
    _, weight, targets, weights = inputs()
    value = on_mesh(configs.Mesh(tensor=4))(jnp.zeros((N, D)), weight, targets, weights)
    np.testing.assert_allclose(value, weights.sum() * math.log(V), rtol=1e-6)


def test_tokens_of_weight_zero_change_nothing():
    hidden, weight, targets, weights = inputs()
    function = jax.jit(jax.value_and_grad(on_mesh(configs.Mesh()), (0, 1)))
    before = function(hidden, weight, targets, weights)
    noise = np.where(weights == 0, 1, 0)[:, None].astype(np.float32) * 50
    after = function(hidden + noise, weight, np.where(weights == 0, 0, targets), weights)
    assert not np.any(np.asarray(after[1][0])[weights == 0])
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.array_equal(a, b)


def test_large_logits_do_not_overflow():
    hidden, weight, targets, weights = inputs()
    value, gradients = both(on_mesh(configs.Mesh(tensor=4)), hidden * 1e4, weight, targets, weights)
    np.testing.assert_allclose(value, 3 * naive(hidden * 1e4, weight, targets, weights), rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_bfloat16_rounds_only_inputs_and_gradients(monkeypatch: pytest.MonkeyPatch):
    """Logits, softmax and sums are float32: the value is exact, and gradients carry 3 roundings of at most 2^-9."""
    monkeypatch.setattr(loss, "CHUNK", 5)
    hidden, weight, targets, weights = inputs(jnp.bfloat16)
    got = both(on_mesh(configs.Mesh(tensor=4)), hidden, weight, targets, weights)
    want = both(naive, hidden.astype(jnp.float32), weight.astype(jnp.float32), targets, weights)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        assert g.dtype == jnp.bfloat16
        assert np.linalg.norm(g.astype(jnp.float32) - w) < 2**-8 * np.linalg.norm(w)


def shapes(jaxpr):
    """Of everything that any part of a program computes."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for parameter in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK", 5)

    def largest(function) -> int:
        program = jax.make_jaxpr(jax.value_and_grad(function, (0, 1)))(*inputs())
        return max(map(math.prod, shapes(program.jaxpr)))

    assert largest(naive) >= N * V
    assert largest(on_mesh(configs.Mesh())) <= max(5 * V, D * V, (N + 2) * D)

"""Attention in blocks against plain attention, plain attention against a loop, and both on meshes and with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import attention, cache, weights
from moejax.model.layers import Pass
from moejax.parallel import axes, collectives
from moejax.parallel.mesh import make_mesh

HEADS = {"multi-head": (3, 3), "grouped-query": (6, 2), "multi-query": (5, 1)}


def qkv(length: int, heads: int, kv: int, seed: int = 0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=(2, length, n, 4)), jnp.float32) for n in (heads, kv, kv)]


def loop(q, k, v):
    """One query after another: the heads of a group are neighbours."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        scores = np.exp(k[b, : t + 1, n // group] @ q[b, t, n] / 2)  # sqrt(4)
        y[b, t, n] = scores / scores.sum() @ v[b, : t + 1, n // group]
    return y


def positions(length: int):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))


def look(q, **options) -> attention.Look:
    return attention.Look(q.shape[-1]**-0.5, **options)


def both(length: int, heads: int, kv: int):
    """Outputs and gradients of `blocked` and of `plain`."""
    def run(function):
        y, back = jax.vjp(function, q, k, v)
        return y, *back(upstream)

    q, k, v = qkv(length, heads, kv)
    upstream = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    plain = jax.jit(lambda: run(lambda q, k, v: attention.plain(q, k, v, positions(length), look(q))))
    return jax.jit(lambda: run(lambda q, k, v: attention.blocked(q, k, v, look(q))))(), plain()


@pytest.mark.parametrize("name", HEADS)
def test_plain_attention_is_the_loop(name: str):
    q, k, v = qkv(7, *HEADS[name])
    np.testing.assert_allclose(attention.plain(q, k, v, positions(7), look(q)), loop(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "name"), [
    *((length, "grouped-query") for length in (1, 63, 64, 65, 97, 257)), (65, "multi-head"), (97, "multi-query")])
def test_blocks_change_nothing(length: int, name: str):
    for got, want in zip(*both(length, *HEADS[name]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # sums of up to 257 float32 terms


def test_long_sequences_have_eight_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SMALLEST", 2)
    found, one_block = [], attention.one_block

    def recorded(q, k, v, look):
        found.append((q.shape[3], k.shape[3]))
        return one_block(q, k, v, look)

    monkeypatch.setattr(attention, "one_block", recorded)
    for got, want in zip(*both(43, 6, 2), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # ceil(43 / 8) = 6 queries a block and 1 in the last; no block multiplies keys after its own end
    assert found[:8] == [(6, 6), (6, 12), (6, 18), (6, 24), (6, 30), (6, 36), (6, 42), (1, 43)]


jitted = jax.jit(lambda q, k, v: attention.blocked(q, k, v, look(q)))


@pytest.mark.parametrize("t", [0, 1, 63, 64, 65, 96])
def test_nothing_sees_what_comes_after_it(t: int):
    q, k, v = qkv(97, 6, 2)
    before = np.asarray(jitted(q, k, v))
    after = np.asarray(jitted(*(x.at[:, t].add(1.) for x in (q, k, v))))
    assert np.array_equal(after[:, :t], before[:, :t])
    assert not np.any(np.all(after[:, t:] == before[:, t:], (1, 2, 3)))


def test_scores_are_float32_in_bfloat16():
    """Keys that differ by less than a bfloat16 score can tell: 256 and 257 × 2, where bfloat16 counts in twos."""
    q, k = jnp.full((1, 2, 1, 4), 16, jnp.bfloat16), jnp.full((1, 2, 1, 4), 8, jnp.bfloat16)
    k = k.at[0, 1, 0, 0].set(8.0625)  # scores 16 × 8 × 4 / 2 = 256 and 256.5
    v = jnp.asarray([0, 1], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    want = 1 / (1 + np.exp(-.5))
    for y in (attention.blocked(q, k, v, look(q)), attention.plain(q, k, v, positions(2)[:1], look(q))):
        np.testing.assert_allclose(np.asarray(y, np.float32)[0, 1, 0], want, rtol=2**-8)


def model(heads: int, kv: int) -> configs.Model:
    return configs.Model(d_model=10, heads=heads, kv_heads=kv, head_dim=6, rope_theta=100.0)


def gradients(layer, values, x, mesh: configs.Mesh, sequence: bool):
    """Output and gradients of an attention layer on a mesh."""
    devices = make_mesh(mesh, jax.devices()[: mesh.devices()])
    specs = {name: axes.spec(v.axes, v.shape, devices.shape) for name, v in weights.flatten(layer).items()}
    where = P(None, "tensor" if sequence else None)

    def device(values, x):
        places = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
        return weights.assemble(layer, values)(x, places, Pass(sequence=sequence))[0]

    def run(values, x, upstream):
        many = jax.shard_map(device, mesh=devices, in_specs=(specs, where), out_specs=where)
        y, back = jax.vjp(many, values, x)
        return y, *back(upstream)

    return jax.device_get(jax.jit(run)(values, x, jnp.sin(10 * x)))


@pytest.mark.parametrize(("heads", "kv", "tensor", "sequence"), [
    (4, 1, 4, False), (8, 2, 4, True), (6, 3, 3, False)])
def test_attention_on_tensor_shards_is_that_of_one_device(made, heads: int, kv: int, tensor: int, sequence: bool):
    layer, values = made(attention.Attention, model(heads, kv))
    x = np.random.default_rng(0).normal(size=(2, 12, 10)).astype(np.float32)
    one = gradients(layer, values, x, configs.Mesh(), False)
    many = gradients(layer, values, x, configs.Mesh(tensor=tensor), sequence)
    assert set(many[1]) == {"q", "k", "v", "o"}
    for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kv", "tensor"), [(1, 2), (2, 2)])
def test_a_cache_changes_nothing(inside, made, kv: int, tensor: int):
    """A prompt in one piece, then pieces of other sizes; the two sequences stand at different positions."""
    layer, values = made(attention.Attention, model(4, kv))
    x = np.random.default_rng(0).normal(size=(2, 12, 10)).astype(np.float32)
    starts = np.array([0, 3], np.int32)

    def whole(values, x):
        places = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
        return weights.assemble(layer, values)(x, places, Pass())[0]

    def pieces(values, x):
        part = weights.assemble(layer, values)
        empty = cache.empty(layer.model, 1, 2, 15, tensor, jnp.dtype(jnp.float32))
        now = jax.tree.map(lambda a: collectives.vary(a[0], ("tensor",)), empty)
        # The second sequence first reads its own first 3 tokens, so that it is ahead of the other ever after.
        ahead = jnp.concatenate([x[1:, :3], x[1:, :3]])
        _, now = part(ahead, positions(3), Pass(), now)
        out = []
        for a, b in ((0, 5), (5, 6), (6, 9)):
            mine = jnp.stack([x[0, a:b], x[1, a + 3:b + 3]])
            y, now = part(mine, starts[:, None] + jnp.arange(a, b, dtype=jnp.int32)[None], Pass(), now)
            out.append(y)
        return jnp.concatenate(out, 1)

    mesh = configs.Mesh(tensor=tensor)
    devices = make_mesh(mesh, jax.devices()[:tensor])
    specs = {name: axes.spec(v.axes, v.shape, devices.shape) for name, v in weights.flatten(layer).items()}
    want = inside(whole, values, x)
    got = inside(pieces, values, x, mesh=mesh, before=(specs, P()))
    np.testing.assert_allclose(got[0], want[0, :9], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1, 3:12], rtol=1e-4, atol=1e-5)


def test_a_cache_writes_each_sequence_where_it_stands():
    stack = cache.empty(configs.Model(kv_heads=1, head_dim=2), 1, 2, 5, 1, jnp.dtype(jnp.bfloat16))
    old = jax.tree.map(lambda a: a[0], stack)
    assert old.k.shape == (2, 5, 1, 2) and old.k.dtype == jnp.bfloat16
    new = jnp.arange(8, dtype=jnp.float32).reshape(2, 2, 1, 2) + 1
    now = old.write(new, -new, jnp.asarray([[0, 1], [3, 4]], jnp.int32))
    assert now.k[:, :, 0, 0].astype(jnp.int32).tolist() == [[1, 3, 0, 0, 0], [0, 0, 0, 5, 7]]
    assert now.v[:, :, 0, 1].astype(jnp.int32).tolist() == [[-2, -4, 0, 0, 0], [0, 0, 0, -6, -8]]
    assert now.k.dtype == jnp.bfloat16


@pytest.mark.parametrize(("kv", "tensor", "held"), [(1, 4, 1), (2, 4, 1), (4, 2, 2), (4, 4, 1)])
def test_a_cache_holds_the_kv_heads_of_one_device(kv: int, tensor: int, held: int):
    kept = cache.empty(configs.Model(kv_heads=kv, head_dim=6), 3, 2, 5, tensor, jnp.dtype(jnp.float32))
    assert kept.k.shape == kept.v.shape == (3, 2, 5, held, 6)

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


def qkv(length: int, heads: int, kv: int, seed: int = 0, value: int = 4):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=(2, length, n, size)), jnp.float32)
            for n, size in ((heads, 4), (kv, 4), (kv, value))]


def loop(q, k, v, scale=1 / 2, window=None, cap=0.0, sinks=None):  # 1 / sqrt(4)
    """One query after another: the heads of a group are neighbours."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = slice(0 if window is None else max(t + 1 - window, 0), t + 1)
        scores = k[b, seen, n // group] @ q[b, t, n] * scale
        scores = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        sink = 0 if sinks is None else np.exp(np.float64(sinks[n]))
        y[b, t, n] = scores / (scores.sum() + sink) @ v[b, seen, n // group]
    return y


def positions(length: int):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))


def look(q, **options) -> attention.Look:
    return attention.Look(**{"scale": q.shape[-1]**-0.5} | options)


def plain(q, k, v, how: attention.Look):
    seen = how.sees(positions(q.shape[1])[:len(q), :, None] - jnp.arange(k.shape[1])[None, None])
    return attention.plain(q, k, v, seen, how)


# One logit per head: weak, about as strong as a key, and so strong that nothing else is left.
SINKS = np.array([-3, -.5, 0, .5, 2, 30], np.float32)
LOOKS = {
    "window 1": {"window": 1}, "window in a block": {"window": 5}, "window of a block": {"window": 64},
    "window over blocks": {"window": 70}, "window beyond the sequence": {"window": 1000},
    "sinks": {"sinks": SINKS}, "cap": {"cap": .8}, "scale": {"scale": .3},
    "all": {"window": 9, "sinks": SINKS, "cap": .8, "scale": 1.5, "value": 3}, "value 7": {"value": 7},
    "window and sinks": {"window": 3, "sinks": SINKS}, "wide window, capped": {"window": 100, "cap": 2.0}}


def both(length: int, heads: int, kv: int, value: int = 4, sinks=None, **options):
    """Outputs and gradients, also in the sinks if there are, of `blocked` and of `plain`."""
    def run(function):
        y, back = jax.vjp(lambda q, k, v, sinks: function(q, k, v, look(q, **{"sinks": sinks} | options)),
                          *qkv(length, heads, kv, value=value), sinks)
        return y, *jax.tree.leaves(back(upstream))

    upstream = jnp.asarray(np.random.default_rng(1).normal(size=(2, length, heads, value)), jnp.float32)
    return jax.jit(lambda: run(attention.blocked))(), jax.jit(lambda: run(plain))()


@pytest.mark.parametrize("name", HEADS)
def test_plain_attention_is_the_loop(name: str):
    q, k, v = qkv(7, *HEADS[name])
    np.testing.assert_allclose(plain(q, k, v, look(q)), loop(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOOKS)
def test_every_look_is_the_loop(name: str):
    """`plain` and `blocked` of 67 tokens, one block and three queries; their gradients are each other's."""
    blocked, plain = both(67, 6, 2, **LOOKS[name])
    how = {key: value for key, value in LOOKS[name].items() if key != "value"}
    want = loop(*qkv(67, 6, 2, value=LOOKS[name].get("value", 4)), **how)
    for got in (blocked, plain):
        np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)
    for got, same in zip(blocked, plain, strict=True):
        np.testing.assert_allclose(got, same, rtol=1e-4, atol=1e-5)
    assert len(plain) == (5 if "sinks" in how else 4)


def test_windows_skip_the_keys_before_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SMALLEST", 2)
    found, one_block = [], attention.one_block

    def recorded(q, k, v, look):
        found.append((q.shape[3], k.shape[3]))
        return one_block(q, k, v, look)

    monkeypatch.setattr(attention, "one_block", recorded)
    for window, seen in {1: [6] * 7 + [1], 4: [6] + [9] * 6 + [4], 8: [6, 12] + [13] * 5 + [8],
                         50: [6, 12, 18, 24, 30, 36, 42, 43]}.items():
        found.clear()
        q, k, v = qkv(43, 6, 2)
        y = jax.jit(lambda q, k, v, how: attention.blocked(q, k, v, how), static_argnums=3)(
            q, k, v, look(q, window=window))
        # 6 queries a block and 1 in the last; the first of them sees window - 1 keys before it
        assert [keys for _, keys in found] == seen, window
        np.testing.assert_allclose(y, loop(q, k, v, window=window), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_sinks_by_differences():
    """In float64 numpy: how much a sum of the outputs moves with each sink."""
    upstream = np.random.default_rng(1).normal(size=(2, 9, 6, 4))
    given, step = np.float64(SINKS), 1e-5
    want = [np.sum(upstream * (loop(*qkv(9, 6, 2), window=4, sinks=given + move) -
                               loop(*qkv(9, 6, 2), window=4, sinks=given - move))) / 2 / step
            for move in step * np.eye(6)]
    for got in both(9, 6, 2, sinks=SINKS, window=4):
        np.testing.assert_allclose(got[4], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 64, 80])
def test_nothing_sees_beyond_its_window(window: int):
    def run(q, k, v):
        return attention.blocked(q, k, v, look(q, window=window, sinks=jnp.asarray(SINKS)))

    q, k, v = qkv(97, 6, 2)
    function = jax.jit(run)
    before = np.asarray(function(q, k, v))
    for t in (0, 9, 63, 64, 96):
        after = np.asarray(function(q, k.at[:, t].add(1.), v.at[:, t].add(1.)))
        moved = np.any(after != before, (0, 2, 3))
        assert np.flatnonzero(moved).tolist() == list(range(t, min(t + window, 97)))


def test_a_layers_look_is_that_of_its_config():
    def of(**fields):
        return attention.look(configs.Model(head_dim=16, **fields), 5, None)

    assert of() == attention.Look(.25, 5)
    assert of(multipliers=(9.0, 9.0, .3, 9.0), caps=(50.0, 30.0)) == attention.Look(.3, 5, 50.0)
    assert of(multipliers=(9.0, 9.0, 0.0, 9.0), caps=(0.0, 30.0)) == attention.Look(.25, 5)


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
    for y in (attention.blocked(q, k, v, look(q)), plain(q, k, v, look(q))):
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


# Values of the config that the weights and the work of attention depend on.
BIASES = ("qkv", "output", "sinks")
VARIANTS = {
    "biases, sinks, window": {"biases": BIASES, "window": 5},
    "norm per head": {"biases": ("qkv",), "qk_norm": "head", "caps": (2.0, 0.0)},
    "norm of all": {"biases": ("qkv", "output"), "qk_norm": "all", "qkv_limit": 1.2,
                    "multipliers": (1.0, 1.0, .6, 1.0)},
    "clipped": {"biases": BIASES, "qkv_limit": .5, "rope_scaling": "yarn factor=4 original=8"},
}
WEIGHTS = {"qkv": {"q_bias", "k_bias", "v_bias"}, "output": {"o_bias"}, "sinks": {"sinks"}}


def variant(name: str, heads: int, kv: int):
    """(the config, the layer's window)."""
    fields = dict(VARIANTS[name])
    return configs.dataclasses.replace(model(heads, kv), **fields), fields.get("window")


def same(many, one):
    for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)  # gradients are sums of 24 tokens, up to 50


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_attention_is_the_same_on_tensor_shards(made, name: str):
    """2 KV heads are split over 2 shards and repeated over 4."""
    changed, window = variant(name, 8, 2)
    layer, values = made(attention.Attention, changed, window)
    x = np.random.default_rng(0).normal(size=(2, 12, 10)).astype(np.float32)
    one = gradients(layer, values, x, configs.Mesh(), False)
    assert set(one[1]) == {"q", "k", "v", "o"}.union(*(WEIGHTS[kind] for kind in changed.biases)) | (
        {"q_norm", "k_norm"} if changed.qk_norm != "none" else set())
    assert all(np.linalg.norm(g) > 1e-2 for g in one[1].values())
    same(gradients(layer, values, x, configs.Mesh(tensor=4), name != "clipped"), one)
    same(gradients(layer, values, x, configs.Mesh(tensor=2), name == "clipped"), one)


LATENTS = {"latent queries": (8, 7, 4, 5), "plain queries": (0, 7, 2, 9)}


def latent(name: str, made):
    changed = configs.dataclasses.replace(
        model(4, 4), latent=LATENTS[name], biases=("output",), multipliers=(1.0, 1.0, .5, 1.0),
        rope_scaling="yarn factor=4 original=8 truncate=0")
    return made(attention.LatentAttention, changed, 7)


@pytest.mark.parametrize("name", LATENTS)
def test_latent_attention_is_the_same_on_tensor_shards(made, name: str):
    layer, values = latent(name, made)
    x = np.random.default_rng(0).normal(size=(2, 12, 10)).astype(np.float32)
    one = gradients(layer, values, x, configs.Mesh(), False)
    assert set(one[1]) == {"q", "kv_down", "kv_norm", "kv", "o", "o_bias", "kv_down_bias"} | (
        {"q_down", "q_norm", "q_down_bias"} if LATENTS[name][0] else set())
    assert all(np.linalg.norm(g) > 1e-2 for g in one[1].values())
    same(gradients(layer, values, x, configs.Mesh(tensor=4), True), one)
    same(gradients(layer, values, x, configs.Mesh(tensor=2), False), one)


@pytest.mark.parametrize("name", LATENTS)
def test_latent_attention_by_hand(inside, made, name: str):
    """From the equations of the paper, in float64; the turned part of the keys is one for all heads."""
    layer, values = latent(name, made)
    layer.model = configs.dataclasses.replace(layer.model, rope_scaling="")
    w = {key: value.astype(np.float64) for key, value in values.items()}
    x = np.random.default_rng(0).normal(size=(2, 12, 10))
    _, rank, turned, _ = LATENTS[name]

    def norm(y, scale):
        return y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * scale

    def turn(y):  # [B T N turned]
        half = turned // 2
        angle = np.arange(12)[None, :, None, None] * 100.0 ** -(np.arange(half) / half)
        a, b = y[..., :half], y[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    c_q = norm(x @ w["q_down"] + w["q_down_bias"], w["q_norm"]) if "q_down" in w else x
    q = np.einsum("btr,rnh->btnh", c_q, w["q"])
    still = 6 - turned
    q = np.concatenate([q[..., :still], turn(q[..., still:])], -1)
    mixed = x @ w["kv_down"] + w["kv_down_bias"]
    kv = np.einsum("btr,rnh->btnh", norm(mixed[..., :rank], w["kv_norm"]), w["kv"])
    shared = np.broadcast_to(turn(mixed[:, :, None, rank:]), (2, 12, 4, turned))
    y = loop(q, np.concatenate([kv[..., :still], shared], -1), kv[..., still:], scale=.5, window=7)
    want = np.einsum("btnh,nhd->btd", y, w["o"]) + w["o_bias"]

    def run(values, x):
        return weights.assemble(layer, values)(x, positions(12), Pass())[0]

    np.testing.assert_allclose(inside(run, values, x.astype(np.float32)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["head", "all"])
def test_norms_biases_and_limits_by_hand(inside, made, norm: str):
    """A bias comes before the norm, the limit after it; only then are queries and keys turned."""
    changed = configs.dataclasses.replace(
        model(4, 2), qk_norm=norm, norm_eps=.5, qkv_limit=.9, biases=BIASES, caps=(2.0, 0.0), rope_theta=1e30)
    layer, values = made(attention.Attention, changed)
    w = {key: value.astype(np.float64) for key, value in values.items()}
    x = np.random.default_rng(0).normal(size=(2, 12, 10))
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[name]) + w[f"{name}_bias"] for name in "qkv")
    over = (-1,) if norm == "head" else (-2, -1)
    q, k = (y / np.sqrt(np.mean(y**2, over, keepdims=True) + .5) * scale
            for y, scale in ((q, w["q_norm"]), (k, w["k_norm"])))
    q, k, v = (np.clip(y, -.9, .9) for y in (q, k, v))
    # Of the three pairs only the first turns, by a radian a position: the base is 10^30.
    angle = np.arange(12)[None, :, None]
    for y in (q, k):
        a, b = y[..., 0].copy(), y[..., 3].copy()
        y[..., 0], y[..., 3] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    y = loop(q, k, v, scale=6**-.5, cap=2.0, sinks=w["sinks"])

    def run(values, x):
        return weights.assemble(layer, values)(x, positions(12), Pass())[0]

    want = np.einsum("btnh,nhd->btd", y, w["o"]) + w["o_bias"]
    np.testing.assert_allclose(inside(run, values, x.astype(np.float32)), want, rtol=1e-4, atol=1e-5)


CACHED = {"plain": (1, {}), "two KV heads": (2, {}), "window and sinks": (2, VARIANTS["biases, sinks, window"]),
          "narrow window": (1, {"window": 2, "qk_norm": "all", "caps": (1.5, 0.0)}),
          "latent": (4, {"window": 4, "latent": (8, 7, 4, 5)})}


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_changes_nothing(inside, made, name: str):
    """A prompt in one piece, then pieces of other sizes; the two sequences stand at different positions."""
    (kv, fields), tensor = CACHED[name], 2
    changed = configs.dataclasses.replace(model(4, kv), **fields)
    kind = attention.LatentAttention if changed.latent else attention.Attention
    layer, values = made(kind, changed, changed.window)
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


def test_a_cache_of_latent_attention_holds_values_of_another_size():
    model = configs.Model(heads=4, kv_heads=4, head_dim=6, latent=(0, 8, 2, 9))
    kept = cache.empty(model, 3, 2, 5, 2, jnp.dtype(jnp.float32))
    assert (kept.k.shape, kept.v.shape) == ((3, 2, 5, 2, 6), (3, 2, 5, 2, 9))

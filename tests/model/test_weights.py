"""Weights: what one string of axes says, how they start, and where they lie on meshes of any size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

from moejax import config as configs
from moejax.model import transformer, weights
from moejax.model.sharded import Sharded
from moejax.parallel import axes
from moejax.parallel.mesh import make_mesh

# Sizes that share no factor, so that no two can be mistaken for each other.
MODEL = configs.Model(
    layers=3, pattern="DMM", d_model=10, heads=6, kv_heads=3, head_dim=14, hidden=11, vocab=13,
    moe=configs.MoE(experts=5, hidden=17, shared=34))


@pytest.mark.parametrize(("text", "shape", "fan_in"), [
    ("embed -> heads head", (10, 6, 14), 10),
    ("embed -> kv head", (10, 3, 14), 10),
    ("heads head -> embed", (6, 14, 10), 84),
    ("embed -> gate hidden", (10, 2, 11), 10),
    ("hidden -> embed", (11, 10), 11),
    ("embed -> choice", (10, 5), 10),
    ("expert: embed -> gate hidden", (5, 10, 2, 11), 10),  # experts are a batch: nothing is summed over them
    ("expert: hidden -> embed", (5, 11, 10), 11),
    ("embed -> vocab", (10, 13), 10),
    ("vocab -> embed", (13, 10), 10),  # a lookup sums over nothing: as if it were the head
])
def test_one_string_gives_shape_and_fan_in(monkeypatch: pytest.MonkeyPatch, text: str, shape, fan_in: int):
    # Every drawn number is 1, so that the weight shows its scale.
    monkeypatch.setattr(jax.random, "truncated_normal", lambda key, low, high, shape, dtype: jnp.ones(shape, dtype))
    w = weights.Weights(MODEL, jax.random.key(0))
    made = w(text)
    assert made.axes == text and made.shape == shape and made[...].dtype == jnp.float32
    np.testing.assert_allclose(made[...], fan_in**-0.5, rtol=1e-6)
    if text == "vocab -> embed":  # never stacked
        return
    layers = w.layers(range(7))(text)
    assert layers.shape == (7, *shape) and axes.names(layers.axes) == ("layer", *axes.names(text))
    np.testing.assert_allclose(layers[...], fan_in**-0.5, rtol=1e-6)
    assert weights.Weights(configs.dataclasses.replace(MODEL, activation="gelu"), jax.random.key(0)).sizes["gate"] == 1


def test_vectors_start_at_a_constant():
    w = weights.Weights(MODEL, jax.random.key(0))
    assert w("norm", 1.0)[...].tolist() == [1] * 10
    bias = w.layers(range(2))("choice", 0.0, weights.Bias)
    assert isinstance(bias, weights.Bias) and bias.axes == "layer choice" and bias[...].tolist() == [[0] * 5] * 2


def test_sizes_can_be_changed_for_a_part():
    w = weights.Weights(MODEL, jax.random.key(0)).layers(range(2))
    assert w.sized(hidden=19)("hidden -> embed").shape == (2, 19, 10)
    assert w("hidden -> embed").shape == (2, 11, 10)


def test_weights_start_truncated_normal_with_the_scale_of_their_fan_in():
    model = configs.dataclasses.replace(MODEL, d_model=400, heads=5, head_dim=100)
    drawn = np.asarray(weights.Weights(model, jax.random.key(0))("embed -> heads head")[...]) * 20  # sqrt(400)
    # Cut at 3, a normal has the variance 1 - 2 × 3 φ(3) / (2 Φ(3) - 1) = 1 - .02659 / .9973 = .97334;
    # 200,000 draws tell it to .2 %.
    np.testing.assert_allclose(drawn.std(), math.sqrt(.97334), rtol=5e-3)
    assert abs(drawn.mean()) < .01 and 2.99 < np.abs(drawn).max() <= 3


def test_every_weight_starts_with_numbers_of_its_own():
    w = weights.Weights(MODEL, jax.random.key(0))
    first, second = w("embed -> kv head")[...], w("embed -> kv head")[...]
    assert not np.any(first == second)
    stack = w.layers(range(2))("hidden -> embed")[...]
    assert not np.any(stack[0] == stack[1])


TINY = configs.Config(model=configs.Model(layers=1, d_model=4, heads=2, kv_heads=1, head_dim=2, vocab=6, tied=True,
                                          moe=configs.MoE(experts=2, hidden=4)))


def test_weights_start_bitwise_equal_on_every_mesh():
    found = []
    for mesh in (configs.Mesh(), configs.Mesh(data=1, fsdp=2, expert=2, tensor=2)):
        sharded = Sharded(TINY, make_mesh(mesh, jax.devices()[: mesh.devices()]))
        found.append(sharded.init(3))
        assert {name: v.sharding.spec for name, v in found[-1].items()} == sharded.specs
    assert len(found[0]) == 12  # embedding; q k v o, two norms; router bias up down; the last norm
    for name, value in found[0].items():
        assert np.array_equal(value, found[1][name]), name
    other = sharded.init(4)
    assert not np.any(other["embedding"] == found[1]["embedding"])


def test_flatten_and_assemble_are_inverse():
    module = transformer.abstract(MODEL)
    flat = weights.flatten(module)
    random = np.random.default_rng(0)
    values = {name: jnp.asarray(random.normal(size=v.shape), jnp.float32) for name, v in flat.items()}
    back = weights.flatten(weights.assemble(module, values))
    assert list(back) == list(flat)
    for name, variable in back.items():
        assert variable[...] is values[name] and variable.axes == flat[name].axes and type(variable) is type(flat[name])
    assert isinstance(flat["embedding"], nnx.Param)


def test_only_balancing_biases_are_not_trained():
    trainable = Sharded(configs.Config(model=MODEL), make_mesh(configs.Mesh(), jax.devices()[:1])).trainable
    assert [name for name, yes in trainable.items() if not yes] == ["runs.1.0.feed.bias"]
    assert "runs.0.0.feed.mlp.up" in trainable and "runs.1.0.feed.shared.up" in trainable


def test_use_casts_and_joins_what_fsdp_splits(inside):
    """Stacked weights arrive without their layer axis, as a scan hands them out."""
    def device(value):
        weight = nnx.Param(value, axes="layer expert: hidden -> embed")
        return weights.use(weight, jnp.bfloat16)[None]

    value = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    whole = inside(device, value, mesh=configs.Mesh(fsdp=2), before=P(None, None, "fsdp"), after=P("fsdp"))
    assert whole.dtype == jnp.bfloat16 and np.array_equal(whole.astype(np.float32), np.stack([value] * 2))


def placed(model: configs.Model, **lengths: int) -> tuple[dict[str, P], dict[str, int]]:
    """Of every weight on a mesh without devices: its spec, and the bytes of it on each device."""
    mesh = AbstractMesh(tuple(lengths.get(axis, 1) for axis in configs.AXES), configs.AXES)
    specs, held = {}, {}
    for name, v in weights.flatten(transformer.abstract(model)).items():
        specs[name] = axes.spec(v.axes, v.shape, mesh.shape)
        held[name] = 4 * math.prod(NamedSharding(mesh, specs[name]).shard_shape(v.shape))
    return specs, held


@pytest.mark.parametrize("dtype, named", [(jnp.float32, 0), (jnp.bfloat16, 1)])
def test_only_a_weight_that_was_made_for_use_has_a_name(dtype, named: int):
    """A name makes a new value, of which a loop over layers keeps a second copy for its backward pass."""
    jaxpr = jax.make_jaxpr(lambda x: weights.use(nnx.Param(x, axes="vocab norm"), dtype))(jnp.ones((3, 5)))
    assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns].count("name") == named


def test_every_weight_of_a_mixed_model_on_a_mesh_of_primes():
    specs, held = placed(configs.dataclasses.replace(MODEL, hidden=33, vocab=39, moe=configs.MoE(
        experts=5, hidden=21, shared=21)), fsdp=2, expert=5, tensor=3, data=7)
    assert specs == {
        "embedding": P("tensor", "fsdp"),
        "head": P("fsdp", "tensor"),
        "norm.scale": P(None),
        **{f"runs.{run}.0.{name}": spec for run in (0, 1) for name, spec in {
            "attention.q": P(None, "fsdp", "tensor", None), "attention.k": P(None, "fsdp", "tensor", None),
            "attention.v": P(None, "fsdp", "tensor", None), "attention.o": P(None, "tensor", None, "fsdp"),
            "attention_norm.scale": P(None, None), "feed_norm.scale": P(None, None)}.items()},
        "runs.0.0.feed.mlp.up": P(None, "fsdp", None, "tensor"),
        "runs.0.0.feed.mlp.down": P(None, "tensor", "fsdp"),
        "runs.1.0.feed.router": P(None, "fsdp", None),
        "runs.1.0.feed.bias": P(None, None),
        "runs.1.0.feed.up": P(None, "expert", "fsdp", None, "tensor"),
        "runs.1.0.feed.down": P(None, "expert", "tensor", "fsdp"),
        "runs.1.0.feed.shared.up": P(None, "fsdp", None, "tensor"),
        "runs.1.0.feed.shared.down": P(None, "tensor", "fsdp"),
    }
    assert held["embedding"] == 4 * (39 // 3) * (10 // 2)
    assert held["runs.1.0.feed.up"] == 4 * 2 * 1 * 5 * 2 * 7  # 2 layers, 5 experts / 5, 10 / 2, 2 gates, 21 / 3
    assert held["runs.1.0.feed.bias"] == 4 * 2 * 5
    assert held["runs.0.0.attention.k"] == 4 * 1 * 5 * 1 * 14


# The model whose public figures are 1.8 T parameters, 111 B an expert and 55 B of attention.
FULL = configs.Model(
    layers=120, d_model=10752, heads=168, kv_heads=1, head_dim=128, activation="gelu", vocab=100352,
    moe=configs.MoE(experts=16, active=2, hidden=43008))


def test_the_full_size_model_counts_and_lies_as_published():
    specs, held = placed(FULL)
    expert = 120 * 2 * 10752 * 43008  # two matrices a layer
    assert expert == 110_981_283_840
    attention = 120 * (2 * 10752 * 168 * 128 + 2 * 10752 * 128)
    assert attention == 55_820_943_360
    rest = 2 * 100352 * 10752 + 120 * (10752 * 16 + 16) + (2 * 120 + 1) * 10752  # vocabulary, routers, norms
    assert sum(held.values()) == 4 * (16 * expert + attention + rest)
    assert round((16 * expert + attention + rest) / 1e9) == 1834

    specs, held = placed(FULL, pipeline=15, tensor=8)
    assert specs["runs.0.0.attention.k"] == P("pipeline", None, None, None)  # one KV head, on all 8 shards
    assert specs["runs.0.0.attention.q"] == P("pipeline", None, "tensor", None)
    stage = {name: size for name, size in held.items() if name.startswith("runs.")}
    # 8 layers of 120: everything / 8 but keys and values, routers, biases and norms
    assert sum(stage.values()) == 4 * 8 * (
        (16 * 2 * 10752 * 43008 + 2 * 10752 * 168 * 128) // 8 + 2 * 10752 * 128 + 10752 * 16 + 16 + 2 * 10752)
    assert held["embedding"] == held["head"] == 4 * 100352 // 8 * 10752


def test_zero1_splits_the_state_of_almost_everything():
    specs, held = placed(FULL, data=4, tensor=8)
    mesh = AbstractMesh((4, 1, 1, 1, 8), configs.AXES)
    shapes = {name: v.shape for name, v in weights.flatten(transformer.abstract(FULL)).items()}
    state = {name: axes.further(specs[name], shapes[name], "data", mesh.shape["data"]) for name in specs}
    assert state["runs.0.0.feed.up"] == P("data", None, None, None, "tensor")
    assert state["embedding"] == P("tensor", "data")
    for name, spec in state.items():  # every weight has a dimension that 4 divides
        assert 4 * math.prod(NamedSharding(mesh, spec).shard_shape(shapes[name])) * 4 == held[name], name


def test_a_weight_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"axis heads of .* has 6 entries, .* tensor 4"):
        placed(configs.dataclasses.replace(MODEL, vocab=16), tensor=4)

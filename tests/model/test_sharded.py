"""The same numbers on any mesh: loss, every gradient and every routing decision against one device.

Tolerances are the rounding of float32 sums taken in another order: 1e-5 relative on losses, 1e-4 on the norm of the
difference of each gradient over its norm.  Decisions and counts are equal.
"""

import functools
import re
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from moejax.config import Config, Data, Mesh, Model, MoE, Train, check
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import axes, collectives
from moejax.parallel.mesh import make_mesh
from moejax.serve.generate import generate_tokens
from moejax.train.state import optimizer_specs
from moejax.train.step import make_gradients

# Sequences of 36 tokens are two groups of 18; ceil(18 × 2 / 4 × .75) = 7 seats where 9 choices come on average.
# Experts work beside a shared one; losses of the router weigh enough to be seen in every gradient before it.
TOPK = MoE(experts=4, active=2, hidden=28, shared=28, group=18, capacity_factor=.75, balance_loss=.3, z_loss=.1)
SIGMOID = replace(TOPK, router="sigmoid", expert_groups=2, active_groups=1, priority="score", jitter=.2, scale=1.5)
CHOICE = replace(TOPK, router="expert_choice", balance_scope="batch", group=None, shared=0)

ONE = Mesh()


def config(moe: MoE = TOPK, mesh: Mesh = ONE, dispatcher: str = "sorted", microbatches: int = 1, **model) -> Config:
    """Two MoE layers; two KV heads, so that they are fewer than four tensor shards."""
    model = {"layers": 2, "d_model": 24, "heads": 4, "kv_heads": 2, "head_dim": 6, "hidden": 20, "vocab": 44} | model
    return Config(model=Model(**model, moe=replace(moe, dispatcher=dispatcher)), mesh=mesh,
                  data=Data(sequence=36, batch=16), train=Train(microbatches=microbatches))


# Compiling is the time of these tests, half of it in LLVM passes that change no collective.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # an emitter that is slower still, and no option any more
    QUICK["xla_cpu_use_fusion_emitters"] = False


def batch() -> Batch:
    """Sequences of which some count much less than others, and sample numbers that are not 0, 1, 2, …"""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 44, (16, 37), dtype=np.int32)
    counts = random.random((16, 36)) < np.linspace(.05, 1, 16)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], counts.astype(np.float32), np.arange(16, dtype=np.int32) * 5 + 3)


class Outcome(NamedTuple):
    gradients: dict[str, np.ndarray]
    figures: Any
    decisions: tuple[np.ndarray, ...]  # expert, slot, kept: [L B T A]; not asked for with microbatches


def program(sharded: Sharded, decisions: bool = True):
    """(weights, batch, key) -> gradients, figures and decisions in training."""
    place = axes.rows(sharded.mesh.shape)

    def device(weights, part, key):
        run = sharded.run(training=True, key=key, rows=part.rows, sequence=False)
        routing = sharded.build(weights)(part.tokens, run)[0].routing
        return routing.expert, routing.slot, routing.kept

    decide = sharded.program(device, (Batch(*[place] * 4), P()), P(None, *place))
    gradients = make_gradients(sharded)
    return jax.jit(lambda *inputs: (*gradients(*inputs), decide(*inputs) if decisions else ()), compiler_options=QUICK)


@pytest.fixture(scope="module")
def outcome(numbers):
    @functools.cache
    def run(config: Config, decisions: bool = True) -> Outcome:
        sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[: config.mesh.devices()]))
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            inputs = numbers(sharded), on_mesh(sharded.mesh, batch()), jax.random.key(1)
            found = program(sharded, decisions and config.train.microbatches == 1)(*inputs)
        for name, spec in optimizer_specs(sharded).items():
            if name in found[0]:
                place = NamedSharding(sharded.mesh, spec)
                assert found[0][name].sharding.is_equivalent_to(place, len(sharded.shapes[name])), name
        return Outcome(*jax.device_get(found))

    return run


def different(got: Outcome, want: Outcome) -> list[str]:
    """What is not the same."""
    assert got.gradients.keys() == want.gradients.keys()
    wrong = [f"gradient of {name}" for name, w in want.gradients.items()
             if not np.linalg.norm(got.gradients[name] - w) <= 1e-4 * np.linalg.norm(w)]
    wrong += [name for name in ("loss", "balance", "z")
              if not abs(getattr(got.figures, name) / getattr(want.figures, name) - 1) <= 1e-5]
    wrong += [name for name in ("load", "dropped")
              if not np.array_equal(getattr(got.figures, name), getattr(want.figures, name))]
    wrong += [f"decisions: {name}" for name, g, w in zip(("expert", "slot", "kept"), got.decisions, want.decisions,
                                                         strict=False) if not np.array_equal(g, w)]
    return wrong


def test_the_case_is_telling(outcome):
    """Some choices are dropped, every weight has a gradient that is not small, and the config is legal but for size."""
    one = outcome(config())
    assert .2 < one.figures.dropped.sum() / one.figures.load.sum() < .4
    assert np.all(one.figures.load > 0)
    assert len(one.gradients) == 14 and min(np.linalg.norm(g) for g in one.gradients.values()) > 1e-2
    np.testing.assert_allclose(one.figures.load.sum(-1), 16 * 36 * 2)
    assert not check(replace(config(), model=replace(config().model, vocab=264)))


@pytest.mark.parametrize(("mesh", "dispatcher", "microbatches"), [
    (Mesh(), "einsum", 2),
    (Mesh(data=8), "sorted", 2),
    (Mesh(fsdp=8), "blocked", 1),
    (Mesh(data=4, tensor=2), "sorted", 4),
    (Mesh(expert=4, tensor=2), "blocked", 1),
    (Mesh(data=2, expert=2, tensor=2, sequence=True), "einsum", 1),
    (Mesh(data=2, expert=2, tensor=2, zero1=True), "sorted", 2),
    (Mesh(tensor=4, sequence=True), "sorted", 1),
])
def test_a_mesh_changes_nothing(outcome, mesh: Mesh, dispatcher: str, microbatches: int):
    assert not different(outcome(config(TOPK, mesh, dispatcher, microbatches)), outcome(config()))


@pytest.mark.parametrize(("moe", "mesh", "dispatcher", "microbatches", "model"), [
    (SIGMOID, Mesh(data=2, fsdp=2, expert=2), "sorted", 2, {"layers": 1}),
    (CHOICE, Mesh(data=2, expert=2, tensor=2, sequence=True), "blocked", 1, {"layers": 1, "activation": "gelu"}),
    (TOPK, Mesh(fsdp=2, expert=2, tensor=2, sequence=True), "sorted", 1, {"pattern": "DM", "tied": True}),
])
def test_other_models_know_no_mesh_either(outcome, moe: MoE, mesh: Mesh, dispatcher: str, microbatches: int, model):
    assert not different(outcome(config(moe, mesh, dispatcher, microbatches, **model)), outcome(config(moe, **model)))


# As many values of the config at once as go together.  Attention of one layer sees 9 tokens, of the other all.
BIASES = ("qkv", "output", "sinks", "mlp", "experts", "router", "norm", "head")
VARIED = {"pattern": "dM", "activation": "clamped_swiglu", "clamp": (1.5, .8), "norm": "layernorm", "window": 9,
          "qk_norm": "all", "qkv_limit": 1.0, "biases": BIASES, "caps": (2.0, 1.5), "multipliers": (3.0, .7, .5, .8),
          "rope_scaling": "llama3 factor=8 low=1 high=4 original=16"}
MIXER = replace(TOPK, router="sparsemixer", mixer_gap=.3, shared_gate=True, scale=1.5)
# Latent attention, a dense layer first, then routing limited to one of two groups of experts.
LATENT = {"layers": 3, "pattern": "DMM", "kv_heads": 4, "latent": (8, 7, 2, 5), "biases": ("output", "experts"),
          "rope_scaling": "yarn factor=4 original=16", "multipliers": (1.0, 1.0, .5, 1.0)}
GROUPED = replace(TOPK, router="sigmoid", expert_groups=2, active_groups=1, scale=2.5)
FAMILIES = {"varied": (MIXER, VARIED), "latent": (GROUPED, LATENT)}


@pytest.mark.parametrize(("family", "count"), [("varied", 50), ("latent", 36)])
def test_families_are_telling_too(outcome, family: str, count: int):
    moe, model = FAMILIES[family]
    one = outcome(config(moe, **model))
    assert len(one.gradients) == count and min(np.linalg.norm(g) for g in one.gradients.values()) > 5e-4
    assert one.figures.dropped.sum() > 0 and np.all(one.figures.load > 0)
    legal = config(moe, **model)
    assert not check(replace(legal, model=replace(legal.model, vocab=264)))


@pytest.mark.parametrize(("family", "mesh", "dispatcher", "microbatches"), [
    ("varied", Mesh(data=2, expert=2, tensor=2, sequence=True), "blocked", 1),
    ("varied", Mesh(fsdp=2, tensor=4), "sorted", 1),  # KV heads are repeated
    ("varied", Mesh(pipeline=2, expert=2, tensor=2), "einsum", 2),
    ("latent", Mesh(fsdp=2, expert=2, tensor=2), "sorted", 1),
    ("latent", Mesh(pipeline=2, data=2, tensor=2, sequence=True), "blocked", 2),
])
def test_families_know_no_mesh(outcome, family: str, mesh: Mesh, dispatcher: str, microbatches: int):
    moe, model = FAMILIES[family]
    many = config(moe, mesh, dispatcher, microbatches, **model)
    if mesh.pipeline > 1:  # which compiles faster
        many = replace(many, train=replace(many.train, remat="full"))
    assert not different(outcome(many), outcome(config(moe, **model)))


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted", "blocked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_bfloat16_keep_weights_and_sums_in_float32(numbers, family: str, dispatcher: str):
    """That their types fit together, without running them."""
    moe, model = FAMILIES[family]
    mesh = Mesh(expert=2, tensor=2)
    narrow = replace(config(moe, mesh, dispatcher, **model), train=Train(compute="bfloat16", remat="dots"))
    sharded = Sharded(narrow, make_mesh(mesh, jax.devices()[:4]))
    inputs = numbers(sharded), on_mesh(sharded.mesh, batch())
    gradients, figures = jax.eval_shape(make_gradients(sharded), *inputs, jax.random.key(1))
    assert {g.dtype for g in jax.tree.leaves((gradients, figures))} == {np.dtype(np.float32)}
    output = jax.eval_shape(sharded.forward, inputs[0], inputs[1].tokens)
    assert output.hidden.dtype == jax.numpy.bfloat16 and output.logits.dtype == np.float32


@pytest.mark.parametrize(("family", "mesh"), [
    ("varied", Mesh(fsdp=2, tensor=4)), ("latent", Mesh(data=2, expert=2, tensor=2))])
def test_families_generate_what_the_whole_sequence_says(numbers, family: str, mesh: Mesh):
    """With a cache on a mesh: each token is the likeliest after all before it, without a cache on one device."""
    moe, model = FAMILIES[family]
    moe = replace(moe, group=None)  # not every length is whole groups
    one, many = (Sharded(config(moe, mesh, vocab=264, **model), make_mesh(mesh, jax.devices()[: mesh.devices()]))
                 for mesh in (ONE, mesh))
    random = np.random.default_rng(1)
    prompts, new = [random.integers(0, 264, length).tolist() for length in (3, 1, 17)], 8
    with jax.numpy_rank_promotion("allow"):
        found = generate_tokens(many, numbers(many), prompts, new)
    assert len({token for row in found for token in row}) > 4  # no model that says one thing
    rows = np.zeros((3, 17 + new), np.int32)
    for row, prompt, tokens in zip(rows, prompts, found, strict=True):
        row[: len(prompt) + new] = prompt + tokens
    best = np.argmax(one.forward(numbers(one), rows).logits, -1)
    for row, prompt, tokens in zip(best, prompts, found, strict=True):
        assert row[len(prompt) - 1:len(prompt) + new - 1].tolist() == tokens


def test_the_public_forward_pass_changes_with_no_mesh_either(numbers):
    """Logits, hidden states, routings and losses, as in evaluation; the tokens' load is that of all devices."""
    found = []
    for mesh in (Mesh(), Mesh(fsdp=2, expert=2, tensor=2)):
        sharded = Sharded(config(replace(TOPK, eval_capacity_factor=.6), mesh),
                          make_mesh(mesh, jax.devices()[: mesh.devices()]))
        found.append(jax.device_get(sharded.forward(numbers(sharded), on_mesh(sharded.mesh, batch().tokens))))
    one, many = found
    assert one.logits.shape == (16, 36, 44) and one.losses.dropped.min() > 0
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert np.array_equal(a, b)
    assert np.array_equal(many.losses.load, one.losses.load) and np.array_equal(many.losses.dropped, one.losses.dropped)
    assert one.losses.load.sum() == 2 * 16 * 36 * 2


def test_bfloat16_learns_nearly_the_same(numbers, outcome):
    """Every matmul's inputs keep 8 bits; weights and gradients stay float32.  Some choices fall to another expert, so
    gradients are compared as a whole, where they agree to a few percent, and the losses to one.
    """
    bfloat16 = replace(config(mesh=Mesh(expert=2), dispatcher="blocked"), train=Train(compute="bfloat16"))
    got, want = outcome(bfloat16, False), outcome(config())
    assert {g.dtype for g in got.gradients.values()} == {np.dtype(np.float32)}
    for name in ("loss", "balance", "z"):
        np.testing.assert_allclose(getattr(got.figures, name), getattr(want.figures, name), rtol=1e-2)
    a, b = (np.concatenate([g.ravel() for g in x.gradients.values()]) for x in (got, want))
    assert a @ b > .95 * np.linalg.norm(a) * np.linalg.norm(b)


def mean_not_sum(x, sequence):
    return lax.pmean(x, "tensor") if "tensor" in collectives.varying(x) else x


def next_device(x, split, concat):
    y = lax.all_to_all(x, "expert", split, concat, tiled=True)
    return lax.ppermute(y, "expert", [(0, 1), (1, 0)])


def other_axes(x, split, concat):
    return lax.all_to_all(x, "expert", concat, split, tiled=True)


def nothing(tree, axes):
    return tree


@pytest.mark.parametrize(("verb", "wrong", "mesh"), [
    ("leave", mean_not_sum, Mesh(tensor=2)),
    ("exchange", next_device, Mesh(expert=2)),
])
def test_a_wrong_collective_is_seen(outcome, numbers, monkeypatch, verb: str, wrong, mesh: Mesh):
    want = outcome(config())
    monkeypatch.setattr(collectives, verb, wrong)
    assert len(different(outcome(config(mesh=replace(mesh, fake_devices=2)), False), want)) > 5


@pytest.mark.parametrize(("verb", "wrong", "mesh"), [
    ("total", nothing, Mesh(data=2)), ("exchange", other_axes, Mesh(expert=2))])
def test_a_collective_that_gives_another_type_is_refused(numbers, monkeypatch, verb: str, wrong, mesh: Mesh):
    sharded = Sharded(config(mesh=mesh), make_mesh(mesh, jax.devices()[:2]))
    monkeypatch.setattr(collectives, verb, wrong)
    with pytest.raises((ValueError, TypeError)):
        program(sharded).lower(numbers(sharded), on_mesh(sharded.mesh, batch()), jax.random.key(1))


COLLECTIVES = re.compile(r"all_reduce|all_gather|reduce_scatter|all_to_all|collective_\w+")


@pytest.mark.parametrize(("mesh", "expected"), [
    (Mesh(), set()),
    (Mesh(data=2), {"all_reduce"}),
    (Mesh(data=2, zero1=True), {"all_reduce", "reduce_scatter"}),
    (Mesh(fsdp=2), {"all_reduce", "all_gather", "reduce_scatter"}),
    (Mesh(expert=2), {"all_reduce", "all_to_all"}),
    (Mesh(tensor=2), {"all_reduce"}),
])
def test_only_collectives_of_axes_in_use_are_emitted(numbers, mesh: Mesh, expected: set[str]):
    sharded = Sharded(config(mesh=mesh), make_mesh(mesh, jax.devices()[: mesh.devices()]))
    inputs = numbers(sharded), on_mesh(sharded.mesh, batch()), jax.random.key(1)
    assert set(COLLECTIVES.findall(jax.jit(make_gradients(sharded)).lower(*inputs).as_text())) == expected

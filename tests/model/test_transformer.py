"""The whole model on one device: runs of layers, scan against loop, rematerialisation, tied weights, caches."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax.config import Config, Mesh, Model, MoE
from moejax.model import layers, transformer
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh

TINY = Model(layers=2, d_model=12, heads=4, kv_heads=2, head_dim=6, hidden=10, vocab=28,
             moe=MoE(experts=3, hidden=14, capacity_factor=.7))
TOKENS = np.random.default_rng(0).integers(0, 28, (2, 8), dtype=np.int32)
ONE, EVERYWHERE = Mesh(), P()


def make(model: Model, mesh: Mesh = ONE, numbers=None) -> tuple[Sharded, dict]:
    sharded = Sharded(Config(model=model, mesh=mesh), make_mesh(mesh, jax.devices()[: mesh.devices()]))
    return sharded, numbers(sharded)


def run(sharded: Sharded, function, values: dict, before=EVERYWHERE, after=EVERYWHERE):
    """function(model, TOKENS) on the mesh, to numpy."""
    def device(values, tokens):
        return function(sharded.build(values), tokens)

    return jax.device_get(jax.jit(sharded.program(device, (before,), after))(values, TOKENS))


@pytest.mark.parametrize(("pattern", "layers", "found"), [
    ("M", 120, [("M", 120)]),
    ("DDDMMMM", 7, [("D", 3), ("M", 4)]),
    ("DM", 6, [("DM", 3)]),
    ("DDDM", 8, [("DDDM", 2)]),
    ("DMMM", 61, [("DMMM", 15), ("D", 1)]),
    ("M", 1, [("M", 1)]),
    ("DMD", 3, [("DMD", 1)]),  # 3 letters however they are cut: one run
    ("mM", 6, [("mM", 3)]),  # windows make other layers
    ("dDMmm", 5, [("dDM", 1), ("m", 2)]),
])
def test_runs_of_equal_layers(pattern: str, layers: int, found: list):
    assert transformer.runs(Model(pattern=pattern, layers=layers)) == found


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8])
def test_runs_compile_as_few_letters_as_possible(length: int):
    def fewest(kinds: str) -> int:
        """Over every way to begin with some unit, repeated; the slow twin."""
        if kinds not in known:
            known[kinds] = min((width + fewest(kinds[width * repeats:])
                                for width in range(1, len(kinds) + 1) for repeats in range(1, len(kinds) // width + 1)
                                if kinds.startswith(kinds[:width] * repeats)), default=0)
        return known[kinds]

    known: dict[str, int] = {}
    for kinds in map("".join, itertools.product("MD", repeat=length)):
        found = transformer.runs(Model(pattern=kinds, layers=length))
        assert "".join(unit * repeats for unit, repeats in found) == kinds
        assert sum(len(unit) for unit, _ in found) == fewest(kinds), kinds


def test_moe_layers_names_each_stack_and_numbers_its_layers():
    def named(pattern: str, layers: int) -> dict:
        return transformer.moe_layers(Model(pattern=pattern, layers=layers))

    assert named("DDDMMMM", 7) == {"runs.1.0.feed.bias": [0, 1, 2, 3]}
    assert named("DM", 6) == {"runs.0.1.feed.bias": [0, 1, 2]}
    assert named("MMD", 6) == {"runs.0.0.feed.bias": [0, 2], "runs.0.1.feed.bias": [1, 3]}
    # MMDM MMDM M
    assert named("MMDM", 9) == {"runs.0.0.feed.bias": [0, 3], "runs.0.1.feed.bias": [1, 4],
                                "runs.0.3.feed.bias": [2, 5], "runs.1.0.feed.bias": [6]}
    assert named("D", 2) == {}


def test_losses_and_routings_come_in_the_order_of_the_layers(numbers):
    """Each MoE layer's bias sends all tokens to an expert of its own; layers are M M D M M D M."""
    model = replace(TINY, layers=7, pattern="MMD",
                    moe=MoE(experts=5, active=1, hidden=2, router="sigmoid", capacity_factor=None))
    sharded, values = make(model, numbers=numbers)
    order = [3, 1, 4, 0, 2]
    for name, layer_numbers in transformer.moe_layers(model).items():
        for row, layer in enumerate(layer_numbers):
            values[name] = values[name].at[row, order[layer]].set(99.)
    output = run(sharded, lambda model, tokens: model(tokens, sharded.run())[0], values)
    assert output.losses.load.tolist() == [[16 * (e == o) for e in range(5)] for o in order]
    assert output.routing.expert.shape == (5, 2, 8, 1)
    assert output.routing.expert[:, 0, 0, 0].tolist() == order


def test_the_scan_is_a_loop_over_the_blocks(numbers):
    """Two runs, one of a repeated pair; jitter gives every layer random numbers of its own."""
    model = replace(TINY, layers=5, pattern="MD", moe=replace(TINY.moe, jitter=.3))
    sharded, values = make(model, numbers=numbers)
    told = sharded.run(training=True, key=jax.random.key(5), rows=jnp.arange(2, dtype=jnp.int32))

    def loop(model, tokens):
        positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
        x, found, number = model.embed(tokens, told), [], 0
        for blocks, (_unit, repeats) in zip(model.runs, transformer.runs(sharded.config.model), strict=True):
            for repeat, block in itertools.product(range(repeats), blocks):
                graph, state = nnx.split(block)
                one = nnx.merge(graph, jax.tree.map(lambda stack, at=repeat: stack[at], state))
                here = replace(told, key=jax.random.fold_in(told.key, number))
                x, _, decisions = one(x, positions, here, None)
                found += [decisions] if decisions is not None else []
                number += 1
        routing, losses = jax.tree.map(lambda *parts: jnp.stack(parts), *found)
        return transformer.Output(None, model.norm(x), routing, losses)

    want = run(sharded, loop, values)
    got = run(sharded, lambda model, tokens: model(tokens, told)[0], values)
    assert got.routing.expert.shape[0] == 3 and got.losses.dropped.min() > 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # five layers of float32
    assert not np.allclose(got.routing.weight[0], got.routing.weight[1])


def test_remat_changes_the_work_and_not_the_gradients(numbers):
    """What is computed again in the backward pass shows in the number of matmuls."""
    sharded, values = make(TINY, numbers=numbers)
    found, matmuls = {}, {}
    for policy in ("none", "weights", "dots", "full"):
        def cost(values, tokens, policy=policy):
            output, _ = sharded.build(values)(tokens, sharded.run(remat=policy))
            return jnp.sum(jnp.sin(output.hidden * 3)) + jnp.sum(output.losses.balance)

        gradient = jax.jit(jax.grad(sharded.program(cost, (P(),), P()), allow_int=False))
        found[policy] = jax.device_get(gradient(values, TOKENS))
        matmuls[policy] = gradient.lower(values, TOKENS).as_text().count("stablehlo.dot_general")
    assert matmuls["weights"] == matmuls["none"] < matmuls["dots"] < matmuls["full"]
    for policy in ("weights", "dots", "full"):
        for name, want in found["none"].items():
            difference = np.linalg.norm(found[policy][name] - want)
            assert difference <= 1e-5 * np.linalg.norm(want), name  # fused otherwise: a few units in the last place


def test_a_tied_model_uses_its_embedding_twice(numbers):
    """Its logits are hidden · embeddingᵀ, and its embedding's gradient is the sum of both uses."""
    model = replace(TINY, layers=1, pattern="D")
    tied, values = make(replace(model, tied=True), numbers=numbers)
    apart, _ = make(model, numbers=numbers)
    assert set(apart.shapes) - set(tied.shapes) == {"head"}
    upstream = np.random.default_rng(1).normal(size=(2, 8, 28)).astype(np.float32)

    def gradients(sharded, values):
        def cost(values, tokens):
            model, told = sharded.build(values), sharded.run()
            logits = model.logits(model(tokens, told)[0].hidden, told)
            return jnp.sum(logits * upstream), logits

        out = sharded.program(cost, (P(),), (P(), P()))
        return jax.device_get(jax.jit(jax.grad(out, has_aux=True))(values, TOKENS))

    one, logits = gradients(tied, values)
    two, same = gradients(apart, values | {"head": values["embedding"].T})
    np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one["embedding"], two["embedding"] + two["head"].T, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(two["embedding"]) > .1 and np.linalg.norm(two["head"]) > .1


@pytest.mark.parametrize("mesh", [Mesh(tensor=4, sequence=True), Mesh(data=2, tensor=2)])
def test_activations_between_blocks_may_be_slices_of_the_sequence(numbers, mesh: Mesh):
    """With `sequence` a device of 4 holds 2 of the 8 tokens after every layer; joined they are what one device has."""
    model = replace(TINY, pattern="DM", moe=replace(TINY.moe, hidden=16), hidden=12)
    one, values = make(model, numbers=numbers)
    many, spread = make(model, mesh, numbers)
    shapes = []

    def hidden(sharded):
        def device(model, tokens):
            output, _ = model(tokens, sharded.run())
            shapes.append((model.embed(tokens, sharded.run()).shape, output.hidden.shape))
            return output.hidden
        return device

    want = run(one, hidden(one), values)
    rows = "data" if mesh.data > 1 else None
    got = run(many, hidden(many), spread, P(rows), P(rows, "tensor" if mesh.sequence else None))
    assert shapes[-1] == ((2, 2, 12),) * 2 if mesh.sequence else ((1, 8, 12),) * 2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_cache_changes_no_hidden_state(numbers):
    """A prompt of 5 tokens, then 1, then 2: each layer of each run finds its own keys and values again."""
    model = replace(TINY, layers=5, pattern="DMM")
    sharded, values = make(model, numbers=numbers)
    told = sharded.run(drop=False)

    def whole(model, tokens):
        return model(tokens, told)[0].hidden

    def pieces(model, tokens):
        cache, out = model.cache(2, 9, jnp.dtype(jnp.float32)), []
        for a, b in ((0, 5), (5, 6), (6, 8)):
            positions = jnp.broadcast_to(jnp.arange(a, b, dtype=jnp.int32), (2, b - a))
            output, cache = model(tokens[:, a:b], told, positions, cache)
            out.append(output.hidden)
        return jnp.concatenate(out, 1)

    want = run(sharded, whole, values)
    np.testing.assert_allclose(run(sharded, pieces, values), want, rtol=1e-4, atol=1e-5)


def test_multipliers_are_as_if_in_the_weights(numbers):
    """Of the embedding 3; of what layers add .5, as in their last matrices; of the scores 2, usually 6^-1/2, as in the
    queries; of the logits .8, as in the head.
    """
    model = replace(TINY, pattern="DM", biases=("mlp", "experts", "output"), moe=replace(TINY.moe, shared=5))
    plain, values = make(model, numbers=numbers)
    changed, _ = make(replace(model, multipliers=(3.0, .5, 2.0, .8)), numbers=numbers)
    ends = {"embedding": 3, "head": .8, "q": 2 * 6**.5, "o": .5, "o_bias": .5, "down": .5, "down_bias": .5}
    scaled = {name: value * np.float32(ends.get(name.split(".")[-1], 1)) for name, value in values.items()}
    assert sum(name.split(".")[-1] in ends for name in values) == 14

    def logits(sharded):
        return lambda model, tokens: model.logits(model(tokens, sharded.run())[0].hidden, sharded.run())

    want = run(plain, logits(plain), scaled)
    np.testing.assert_allclose(run(changed, logits(changed), values), want, rtol=1e-4, atol=1e-5)
    usual, _ = make(replace(model, multipliers=(1.0, 1.0, 0.0, 1.0)), numbers=numbers)
    assert np.array_equal(run(usual, logits(usual), values), run(plain, logits(plain), values))


@pytest.mark.parametrize(("pattern", "sees"), [
    ("d", 5),  # 2 tokens back in each of the two layers
    ("dD", 8), ("Dd", 8), ("D", 8), ("m", 5)])
def test_small_letters_have_a_window(numbers, pattern: str, sees: int):
    sharded, values = make(replace(TINY, pattern=pattern, window=3, moe=replace(TINY.moe, capacity_factor=None)),
                           numbers=numbers)
    other = TOKENS.copy()
    other[:, 0] = (other[:, 0] + 1) % 28

    def both(model, tokens):
        return [model(each, sharded.run())[0].hidden for each in (tokens, jnp.asarray(other))]

    one, two = run(sharded, both, values)
    assert np.flatnonzero(np.any(one != two, (0, 2))).tolist() == list(range(sees))


def test_embedding_looks_up_rows(numbers):
    sharded, values = make(TINY, numbers=numbers)
    table = np.asarray(values["embedding"])
    assert np.array_equal(run(sharded, lambda model, tokens: model.embed(tokens, layers.Pass()), values),
                          table[TOKENS])

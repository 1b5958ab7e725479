"""One training step: what it computes does not depend on how it is laid out, and every part of it is what it says.

The model has every source of trouble at once: dense and sparse layers, capacity that drops tokens, a balancing bias,
jitter, targets that do not count.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train
from moejax.data.batch import Batch
from moejax.model import transformer
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel.mesh import make_mesh
from moejax.plan.count import make_program
from moejax.train.fault import Health
from moejax.train.optimizer import make_optimizer
from moejax.train.state import State, shardings, trained
from moejax.train.step import balanced, make_evaluation, make_gradients, make_step, make_update, step_key

RATE = 0.01
BIAS = "runs.0.1.feed.bias"  # of the second block of DM, [2 E]
MOE = MoE(experts=4, active=2, hidden=8, router="sigmoid", group=4, capacity_factor=1.0, jitter=0.3, bias_rate=RATE)
CONFIG = Config(
    name="x", run_dir="x", data=Data(sequence=8, batch=8), optimizer=Optimizer(lr=0.01, warmup=0, clip=0.5),
    model=Model(layers=4, pattern="DM", d_model=8, heads=4, kv_heads=2, head_dim=2, hidden=8, vocab=264, moe=MOE))
ONE = Mesh()
MESHES = {
    "data 2 × expert 2 × tensor 2, ZeRO-1": Mesh(data=2, expert=2, tensor=2, zero1=True),
    "data 2 × fsdp 2 × tensor 2, sequence, ZeRO-1": Mesh(data=2, fsdp=2, tensor=2, sequence=True, zero1=True)}


@cache
def on(mesh: Mesh, **changes) -> Sharded:
    config = replace(CONFIG, mesh=mesh, **changes)
    return Sharded(config, make_mesh(mesh, jax.devices()[: mesh.devices()]))


@cache
def gradients_of(sharded: Sharded):
    return jax.jit(make_gradients(sharded))


def optimizer_of(config: Config) -> optax.GradientTransformation:
    axes = {name: axes for name, axes in on(ONE).axes.items() if on(ONE).trainable[name]}
    return make_optimizer(config.optimizer, config.train.steps, axes)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The start, with a bias in the first MoE layer that overloads two experts, so that tokens are dropped."""
    made = jax.device_get(on(ONE).init(1))
    return made | {BIAS: np.array([[0.3, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)}


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Random tokens; about a third of the targets do not count, more of them in the first rows."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 264, (8, 9), dtype=np.int32)
    counts = random.random((8, 8)) < np.linspace(0.2, 1.0, 8)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], counts.astype(np.float32), np.arange(100, 108, dtype=np.int32))


def start(sharded: Sharded, weights: dict[str, np.ndarray], step: int = 0) -> State:
    """A state that a step may consume."""
    optimizer = optimizer_of(sharded.config)
    moments = optimizer.init(jax.tree.map(jnp.asarray, trained(sharded, weights)))
    state = State(jnp.int32(step), weights, moments, Health.fresh())
    # to numpy and back: what lies on its device already would be shared with the state given away
    return jax.tree.map(jax.device_put, jax.device_get(state), shardings(sharded, optimizer))


def key_of(step: int):
    return step_key(on(ONE), jnp.int32(step))


@pytest.fixture(scope="module")
def reference(weights, batch):
    """Gradients and figures of one device without microbatches, at steps 0 and 1."""
    return [jax.device_get(gradients_of(on(ONE))(weights, batch, key_of(step))) for step in (0, 1)]


def assert_close(got: dict, expected: dict) -> None:
    """Within what summing float32 in another order changes: 1e-4 of each tensor's norm, and of nothing 1e-7."""
    assert set(got) == set(expected)
    for name in expected:
        off = np.linalg.norm(np.asarray(got[name]) - np.asarray(expected[name]))
        assert off <= 1e-4 * np.linalg.norm(np.asarray(expected[name])) + 1e-7, name


def norm_of(gradients: dict) -> float:
    return float(np.linalg.norm(np.concatenate([np.ravel(each) for each in gradients.values()]).astype(np.float64)))


def test_the_reference_has_drops_and_gradients_everywhere(reference):
    gradients, figures = reference[0]
    assert set(gradients) == {name for name, trains in on(ONE).trainable.items() if trains}
    assert all(np.any(each != 0) for each in gradients.values())
    assert figures.dropped.shape == (2,) and figures.dropped[0] > 5
    assert 4.5 < figures.loss < 7  # log 264 is 5.6


def test_load_counts_every_choice(reference):
    load = reference[0][1].load
    assert load.shape == (2, 4)
    np.testing.assert_array_equal(load.sum(-1), 8 * 8 * 2)  # sequences × tokens × choices
    assert load[0, 0] + load[0, 2] > 80  # the experts that the bias favours


def test_microbatches_add_up(reference, weights, batch):
    """Four here, and two on the meshes below."""
    sharded = on(ONE, train=Train(microbatches=4))
    gradients, figures = gradients_of(sharded)(weights, batch, key_of(0))
    assert_close(gradients, reference[0][0])
    assert_close(figures._asdict(), reference[0][1]._asdict())
    np.testing.assert_array_equal(figures.load, reference[0][1].load)


@pytest.fixture(scope="module", params=MESHES.values(), ids=MESHES)
def stepped(request, weights, batch) -> tuple[Sharded, State, dict, State, dict]:
    """State and figures after a step on a mesh from step 0, and from step 1."""
    sharded = on(request.param, train=Train(microbatches=2))
    step = make_step(sharded, optimizer_of(sharded.config))
    rows = on_mesh(sharded.mesh, batch)
    return sharded, *step(start(sharded, weights), rows), *step(start(sharded, weights, 1), rows)


def moments(state: State):
    return state.optimizer[0].mu


def test_a_mesh_gives_the_gradients_of_one_device(reference, stepped):
    """The first moment after one step is 0.1 × the clipped gradient."""
    _, state, figures, _, _ = stepped
    gradients, expected = reference[0]
    scale = min(1.0, 0.5 / norm_of(gradients))
    assert scale < 0.9
    assert_close(moments(state), {name: 0.1 * scale * each for name, each in gradients.items()})
    assert_close({name: figures[name] for name in expected._fields}, expected._asdict())
    np.testing.assert_array_equal(figures["load"], expected.load)
    np.testing.assert_array_equal(figures["dropped"], expected.dropped)


def test_the_clip_norm_counts_every_shard_once(reference, stepped):
    assert float(stepped[2]["grad_norm"]) == pytest.approx(norm_of(reference[0][0]), rel=1e-5)


def test_jitter_is_that_of_the_step_on_every_mesh(reference, stepped):
    first, second = (figures.loss for _, figures in reference)
    assert abs(first - second) > 1e-3
    assert float(stepped[2]["loss"]) == pytest.approx(float(first), rel=1e-5)
    assert float(stepped[4]["loss"]) == pytest.approx(float(second), rel=1e-5)


def test_a_mesh_gives_the_weights_of_one_device(reference, stepped, weights):
    config = on(ONE).config
    update = jax.jit(make_update(on(ONE), optimizer_of(config)))
    expected, figures = update(start(on(ONE), weights), *reference[0])
    sharded, state, more, _, _ = stepped
    assert int(state.step) == int(expected.step) == 1
    assert float(more["lr"]) == float(figures["lr"]) == pytest.approx(0.01)
    # AdamW's first step is the rate times the sign of the gradient, so what is compared is the way that was gone
    for name, old in weights.items():
        way, same = np.asarray(state.weights[name]) - old, np.asarray(expected.weights[name]) - old
        sure = np.abs(reference[0][0].get(name, np.ones(old.shape))) > 1e-6
        np.testing.assert_allclose(way[sure], same[sure], atol=1e-5, err_msg=name)
        assert state.weights[name].sharding == sharded.shardings[name]
    np.testing.assert_array_equal(state.weights[BIAS], expected.weights[BIAS])


def test_zero1_splits_the_moments_over_data(stepped):
    sharded, state = stepped[:2]
    for name, moment in moments(state).items():
        assert "data" not in sharded.specs[name]
        # a weight whose every dimension is split already, here the embedding on fsdp × tensor, has none left for data
        free = any(axis is None and size % 2 == 0 for axis, size in zip(sharded.specs[name], moment.shape, strict=True))
        assert ("data" in moment.sharding.spec) == free, name
        mine, whole = moment.addressable_shards[0].data, state.weights[name].addressable_shards[0].data
        assert mine.size * (1 + free) == whole.size, name
    split = [name for name, moment in moments(state).items() if "data" in moment.sharding.spec]
    assert len(split) >= len(moments(state)) - 2


def clipped(reference, weights, clip: float) -> tuple[dict, dict]:
    """Moments and figures of an update with this clip."""
    sharded = on(ONE, optimizer=replace(CONFIG.optimizer, clip=clip))
    state, figures = jax.jit(make_update(sharded, optimizer_of(sharded.config)))(start(sharded, weights), *reference[0])
    return moments(state), figures


def test_moments_are_updated_in_place():
    """Else the compiler for CPUs copies each before it writes over it."""
    _, step, args = make_program(CONFIG, make_mesh(ONE, jax.devices()[:1]))
    text = step.lower(*args).compile().as_text()
    assert "%state_optimizer" in text and "copy(%state_optimizer" not in text


@pytest.mark.parametrize("clip", [0.0, 0.125, 1e6])
def test_clip(reference, weights, clip):
    gradients = reference[0][0]
    norm = norm_of(gradients)
    assert 0.125 < norm < 1e6
    moment, figures = clipped(reference, weights, clip)
    assert float(figures["grad_norm"]) == pytest.approx(norm, rel=1e-5)  # before it is clipped
    scale = 0.125 / norm if clip == 0.125 else 1.0
    assert_close(moment, {name: 0.1 * scale * each for name, each in gradients.items()})


def test_the_bias_moves_against_the_load(weights):
    load = jnp.array([[9.0, 3.0, 4.0, 0.0], [4.0, 4.0, 4.0, 4.0]])  # means are 4
    moved = balanced(on(ONE), jax.tree.map(jnp.asarray, weights), load)
    assert set(moved) == {BIAS}
    expected = weights[BIAS] + RATE * np.array([[-1, 1, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(moved[BIAS], expected, atol=1e-7)
    assert balanced(on(ONE, model=replace(CONFIG.model, moe=replace(MOE, router="topk"))), {}, load) == {}


def test_a_step_moves_the_bias_of_the_layer_that_is_loaded(reference, stepped, weights):
    load = reference[0][1].load
    assert len(np.unique(np.sign(load.mean(-1, keepdims=True) - load), axis=0)) == 2  # the layers differ
    expected = weights[BIAS] + RATE * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_allclose(stepped[1].weights[BIAS], expected, atol=1e-7)
    assert BIAS not in moments(stepped[1])


def alike(sharded: Sharded) -> dict[str, np.ndarray]:
    return {name: np.full(shape, 0.02, np.float32) for name, shape in sharded.shapes.items()}


def test_every_bias_belongs_to_its_layer():
    """DMMDM has its MoE layers in several stacks: a bias that forces expert n stands in MoE layer n."""
    sharded = on(ONE, model=replace(CONFIG.model, layers=5, pattern="DMM"))
    values = alike(sharded)
    found = []
    for name, layers in transformer.moe_layers(sharded.config.model).items():
        values[name] = 10 * np.eye(4, dtype=np.float32)[layers]
        found += layers
    assert sorted(found) == [0, 1, 2] and len({name for name in values if name.endswith("bias")}) > 1
    routing = sharded.forward(values, jnp.zeros((1, 8), jnp.int32)).routing
    for layer in range(3):
        np.testing.assert_array_equal(routing.expert[layer, ..., 0], layer)


def test_a_model_without_experts(batch):
    sharded = on(ONE, model=replace(CONFIG.model, layers=1, pattern="D"))
    values = alike(sharded)
    gradients, figures = gradients_of(sharded)(values, batch, key_of(0))
    assert figures.load.shape == (0, 1) and figures.dropped.shape == (0,)
    assert float(figures.loss) == pytest.approx(np.log(264), rel=1e-3)  # all logits are equal
    assert float(figures.balance) == float(figures.z) == 0
    assert norm_of(gradients) > 0


@cache
def evaluation_of(sharded: Sharded):
    return make_evaluation(sharded)


def test_evaluation_sums_what_counts(weights, batch):
    def loss(part: Batch) -> tuple[float, float]:
        return tuple(map(float, evaluation_of(on(ONE))(weights, part)))

    whole, count = loss(batch)
    assert count == batch.weights.sum() and 4.5 < whole / count < 7
    wild = batch._replace(targets=np.where(batch.weights > 0, batch.targets, 3).astype(np.int32))
    assert np.any(wild.targets != batch.targets)
    assert loss(wild) == (whole, count)
    counted = batch._replace(targets=np.where(batch.weights > 0, 3, batch.targets).astype(np.int32))
    assert loss(counted)[0] != whole
    left = batch._replace(weights=batch.weights * (np.arange(8) < 4))
    right = batch._replace(weights=batch.weights * (np.arange(8) >= 4))
    assert loss(left)[1] + loss(right)[1] == count
    assert loss(left)[0] + loss(right)[0] == pytest.approx(whole, rel=1e-5)
    assert loss(batch._replace(weights=np.zeros_like(batch.weights))) == (0.0, 0.0)
    assert loss(batch._replace(rows=batch.rows + 7)) == (whole, count)  # no jitter here


def test_evaluation_is_the_same_on_a_mesh(weights, batch):
    totals = [float(evaluation_of(sharded)(weights, on_mesh(sharded.mesh, batch))[0])
              for sharded in map(on, (ONE, *MESHES.values()))]
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-5)

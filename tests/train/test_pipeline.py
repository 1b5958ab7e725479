"""A pipeline gives the numbers of the model without one, whatever the schedule, the stages and the mesh."""

import os
import subprocess
import sys
from functools import cache

import jax
import numpy as np
import pytest

import moejax
from moejax import config as configs
from moejax.config import ConfigError
from moejax.data.batch import Batch
from moejax.model.sharded import on_mesh
from moejax.parallel import collectives, pipeline, schedules
from moejax.train import loop, verify
from moejax.train.step import make_evaluation, make_gradients

BASE = ("model.layers=8", "model.d_model=40", "model.heads=4", "model.head_dim=6", "model.hidden=44",
        "model.moe.experts=4", "model.moe.hidden=52", "model.moe.balance_loss=0.1", "model.moe.z_loss=0.1",
        "model.moe.capacity_factor=1.0", "data.sequence=26", "data.batch=16")
MESHES = {"p8": ("mesh.pipeline=8", "train.microbatches=8"),
          "p4t2": ("mesh.pipeline=4", "mesh.tensor=2", "train.microbatches=8"),
          "p2e4": ("mesh.pipeline=2", "mesh.expert=4", "train.microbatches=4"),
          "p2e2t2": ("mesh.pipeline=2", "mesh.expert=2", "mesh.tensor=2", "train.microbatches=8"),
          "d2p2t2": ("mesh.data=2", "mesh.pipeline=2", "mesh.tensor=2", "train.microbatches=4"),
          "f2p2e2": ("mesh.fsdp=2", "mesh.pipeline=2", "mesh.expert=2", "train.microbatches=4")}


def make(*overrides: str) -> configs.Config:
    config, problems = configs.override(configs.Config(), [*BASE, *overrides])
    assert not problems + configs.check(config)
    return config


@cache
def batch_of(config: configs.Data) -> Batch:
    random = np.random.default_rng(0)
    shape = (config.batch, config.sequence)
    # A few texts end early: microbatches then weigh differently.
    ends = random.integers(5, 2 * config.sequence, (config.batch, 1))
    return Batch(random.integers(0, 264, shape, dtype=np.int32), random.integers(0, 264, shape, dtype=np.int32),
                 (np.arange(config.sequence) < ends).astype(np.float32), np.arange(config.batch, dtype=np.int32))


@cache
def weights_of(model: configs.Model) -> dict[str, np.ndarray]:
    sharded = verify.make_sharded(configs.Config(model=model))
    return {name: np.asarray(value) for name, value in sharded.init(3).items()}


def run(config: configs.Config):
    sharded = verify.make_sharded(config)
    weights = jax.device_put(weights_of(config.model), sharded.shardings)
    gradients, figures = jax.jit(make_gradients(sharded))(
        weights, on_mesh(sharded.mesh, batch_of(config.data)), jax.random.key(1))
    return jax.device_get((gradients, figures))


plain = cache(run)


def agree(config: configs.Config) -> None:
    """Tolerances as in `verify`: the rounding of float32 sums taken in another order."""
    (gradients, figures), (expected, before) = run(config), plain(configs.put(
        verify.single(config), ["train", "remat"], "none"))
    np.testing.assert_allclose(figures.loss, before.loss, rtol=verify.LOSS)
    np.testing.assert_allclose([figures.balance, figures.z], [before.balance, before.z], rtol=verify.LOSS)
    np.testing.assert_array_equal(figures.load, before.load)
    np.testing.assert_array_equal(figures.dropped, before.dropped)
    worst = {name: verify.gap(expected[name], gradients[name]) for name in expected}
    assert max(worst.values()) <= verify.GRADIENT, worst


def case(mesh: str, schedule: str, uneven: bool) -> configs.Config:
    """10 layers for each chunk of a stage, so that also 8 stages can be uneven."""
    chunks = 2 if schedule == "interleaved" else 1
    layers = 10 * chunks
    parts = make(*MESHES[mesh]).mesh.pipeline * chunks
    stages = [1] * (parts - 2) + [2, layers - parts] if uneven else []
    return make(*MESHES[mesh], f"mesh.schedule={schedule}", f"mesh.chunks={chunks}", f"model.layers={layers}",
                f"mesh.stage_layers={stages}", "train.remat=full")


# Half of all: every mesh with two schedules, every schedule with even and with uneven stages.
@pytest.mark.parametrize(("mesh", "schedule", "uneven"), [
    (mesh, schedule, (i // 2 + j) % 2 == 0) for i, mesh in enumerate(MESHES)
    for j, schedule in enumerate(configs.SCHEDULES) if (i + j) % 2 == 0])
def test_loss_and_gradients_are_those_of_the_plain_model(mesh, schedule, uneven):
    agree(case(mesh, schedule, uneven))


@pytest.mark.parametrize("overrides", [
    ("mesh.pipeline=4", "train.remat=none"),
    ("mesh.pipeline=4", "mesh.tensor=2", "train.remat=dots", "mesh.schedule=zero_bubble"),
    ("mesh.pipeline=2", "mesh.fsdp=2", "train.remat=none", "mesh.schedule=interleaved", "mesh.chunks=2"),
    ("mesh.pipeline=4", "mesh.tensor=2", "mesh.sequence=true", "mesh.stage_layers=1,3,2,2"),
    ("mesh.pipeline=2", "mesh.data=2", "mesh.tensor=2", "mesh.zero1=true", "model.kv_heads=2"),
    ("mesh.pipeline=2", "model.pattern=DDDDMMMM", "model.tied=true"),  # one stage without experts
    ("mesh.pipeline=4", "model.pattern=DDDDDDDD", "mesh.stage_layers=1,1,3,3"),  # no experts at all
    ("mesh.pipeline=3", "model.pattern=DMM", "mesh.schedule=zero_bubble"),  # stages that differ in their layers
    ("mesh.pipeline=4", "mesh.expert=2", "model.moe.router=sigmoid", "model.moe.dispatcher=blocked",
     "model.moe.capacity_factor=none"),
    ("mesh.pipeline=2", "mesh.data=4", "model.moe.router=expert_choice", "model.moe.jitter=0.2"),
    ("mesh.pipeline=8", "mesh.stage_layers=1,1,1,1,1,1,1,1", "train.microbatches=2"),
], ids=" ".join)
def test_options(overrides):
    agree(make("train.microbatches=4", *overrides))


def test_the_balance_loss_of_a_whole_microbatch():
    """It is defined over a microbatch, so the plain model takes as many."""
    config = make("mesh.pipeline=2", "mesh.tensor=2", "train.microbatches=4", "model.moe.balance_scope=batch")
    without = configs.put(config, ["mesh"], configs.Mesh())
    (gradients, figures), (expected, before) = run(config), run(without)
    np.testing.assert_allclose(figures.balance, before.balance, rtol=verify.LOSS)
    assert max(verify.gap(expected[name], gradients[name]) for name in expected) <= verify.GRADIENT


def test_evaluation(tmp_path):
    found = []
    for overrides in ((), ("mesh.pipeline=4", "mesh.tensor=2", "mesh.stage_layers=1,3,2,2", "train.microbatches=4")):
        config = make(*overrides)
        sharded = verify.make_sharded(config)
        weights = jax.device_put(weights_of(config.model), sharded.shardings)
        found.append(make_evaluation(sharded)(weights, on_mesh(sharded.mesh, batch_of(config.data))))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_a_table_from_a_file(tmp_path):
    table = schedules.one_f_one_b(2, 4)
    path = tmp_path / "table.csv"
    path.write_text("\n".join(",".join(" ".join(map(str, cell)) for cell in row) for row in table.ticks))
    agree(make("mesh.pipeline=2", "train.microbatches=4", f"mesh.schedule={path}"))


def test_a_table_that_cannot_be_carried_out_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("F0,F0\n,B0\nB0,\n")
    config = make("mesh.pipeline=2", f"mesh.schedule={path}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError) as caught:
        loop.train(config)
    assert caught.value.problems == [f"{path}: tick 0, stage 1: F0 uses F0 of part 0 (stage 0) before it is there: it "
                                     "arrives for tick 1"]
    assert not (tmp_path / "run").exists()


def test_a_hand_over_in_the_wrong_direction_is_found(monkeypatch):
    right = collectives.pass_on
    monkeypatch.setattr(collectives, "pass_on", lambda x, step: right(x, -step))
    with pytest.raises(AssertionError):
        agree(make("mesh.pipeline=4", "train.microbatches=4"))


def test_a_slot_that_is_overwritten_too_early_is_found(monkeypatch):
    def small(*args, **kwargs):
        plan = lower(*args, **kwargs)
        columns = plan.columns | {name: np.minimum(plan.columns[name], 1) for name in ("get_x", "f_slot", "b_slot")}
        return plan._replace(columns=columns)

    lower = pipeline.lower
    monkeypatch.setattr(pipeline, "lower", small)
    with pytest.raises(AssertionError):
        agree(make("mesh.pipeline=4", "train.microbatches=8", "train.remat=full"))


def test_a_training_run_ends_as_without(tmp_path):
    """12 steps; beyond rounding nothing may grow, so that the last losses agree as the first do."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"The {i}th text counts {' '.join(map(str, range(i, i + 60)))}.\n" * 4)
    losses = []
    staged = ("mesh.pipeline=4", "mesh.fake_devices=4", "train.remat=full")
    for name, overrides in (("plain", ()), ("pipeline", staged)):
        config = make("train.steps=12", "train.eval_every=6", "train.eval_batches=1", "optimizer.warmup=2",
                      "train.microbatches=4", "model.d_model=32", f"data.sources={text}", "data.validation=0.2",
                      f"data.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / name}", "mesh.fake_devices=1",
                      *overrides)
        loop.train(config)
        records = loop.read_metrics(tmp_path / name)
        losses.append([record["loss"] for record in records])  # evaluation of equal weights has a test of its own
        assert len(records) == 12
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    # What the pipeline trained is used without one.
    logits = [moejax.load(tmp_path / name)(np.arange(26)[None]).logits for name in ("plain", "pipeline")]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    assert 0 <= loop.json.loads((tmp_path / "pipeline" / "pipeline.json").read_text())["bubble"] < 1


DEADLOCK = """
import moejax
from moejax import config as configs
from moejax.parallel import mesh as meshes
config, problems = configs.override(configs.Config(), [
    "mesh.pipeline=4", "mesh.tensor=2", "mesh.fake_devices=8", "model.layers=4", "model.d_model=64",
    "model.moe.hidden=64", "model.moe.experts=4", "data.sequence=256", "data.batch=16", "train.microbatches=8"])
meshes.start(config.mesh)
import jax, numpy as np
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.train.step import make_gradients
sharded = Sharded(config, meshes.make_mesh(config.mesh))
tokens = np.random.default_rng(0).integers(0, 264, (16, 256), dtype=np.int32)
batch = on_mesh(sharded.mesh, Batch(tokens, tokens, np.ones((16, 256), np.float32), np.arange(16, dtype=np.int32)))
weights, program = sharded.init(0), jax.jit(make_gradients(sharded))
losses = [float(program(weights, batch, jax.random.key(0))[1].loss) for _ in range(20)]
assert len(set(losses)) == 1, losses
print("same 20 times")
"""


def test_collectives_of_forward_and_backward_never_wait_for_each_other():
    """At such a size XLA's threads can starve each other if a tick's forward and backward are independent."""
    done = subprocess.run([sys.executable, "-c", DEADLOCK], capture_output=True, text=True, timeout=400,
                          env={**os.environ, "XLA_FLAGS": ""})  # what is tested here runs long; optimized, as for users
    assert done.stdout == "same 20 times\n", done.stderr[-3000:]

"""A model that sees: the same numbers on every mesh, nothing kept for what is frozen, and stages that begin with one
another's weights."""

import json
from functools import cache

import jax
import numpy as np
import pytest

import moejax
from moejax import config as configs
from moejax.config import ConfigError
from moejax.data.batch import Batch, Images
from moejax.model.sharded import on_mesh
from moejax.model.weights import group
from moejax.train import verify
from moejax.train.begin import beginning
from moejax.train.checkpoint import write_weights
from moejax.train.loop import train
from moejax.train.optimizer import make_optimizer
from moejax.train.state import abstract, trained
from moejax.train.step import make_evaluation, make_gradients

TEXT = ("model.layers=4", "model.d_model=40", "model.heads=4", "model.head_dim=6", "model.hidden=44",
        "model.moe.experts=4", "model.moe.hidden=52", "model.moe.capacity_factor=1.0", "data.sequence=22",
        "data.batch=8", "model.moe.balance_loss=0.1")
SEES = (*TEXT, "model.pattern=VM", "model.vision=clip size=14 patch=7 width=24 layers=2 heads=4 hidden=28",
        "model.cross=last latents=3 heads=2 head=10 frames=2", "data.images=3")
MESHES = {"d2e2t2": ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2"),
          "f2t2": ("mesh.fsdp=2", "mesh.tensor=2", "mesh.sequence=true", "train.microbatches=2"),
          "p2t2": ("mesh.pipeline=2", "mesh.tensor=2", "train.microbatches=4"),
          "p2f2 full": ("mesh.pipeline=2", "mesh.fsdp=2", "train.microbatches=4", "train.remat=full"),
          "p4 zero bubble": ("mesh.pipeline=4", "mesh.schedule=zero_bubble", "train.microbatches=4"),
          "p2e2 chunks": ("mesh.pipeline=2", "mesh.expert=2", "mesh.schedule=interleaved", "mesh.chunks=2",
                          "train.microbatches=2"),
          "p2 uneven": ("mesh.pipeline=2", "mesh.stage_layers=3,1", "train.microbatches=2")}


def make(*overrides: str) -> configs.Config:
    config, problems = configs.override(configs.Config(), overrides)
    assert not problems + configs.check(config)
    return config


@cache
def batch_of(data: configs.Data) -> Batch:
    random = np.random.default_rng(0)
    shape = data.batch, data.sequence
    looks = np.zeros((*shape, data.images), bool)
    looks[1:, 3:9, 0] = looks[1:, 9:, 1] = looks[5:, 15:, 2] = True
    images = Images(random.integers(0, 256, (data.batch, data.images, 2, 14, 14, 3)).astype(np.uint8),
                    random.integers(1, 3, (data.batch, data.images)).astype(np.int32), looks)
    tokens, targets = (random.integers(0, 264, shape, dtype=np.int32) for _ in range(2))
    return Batch(tokens, targets, (random.random(shape) < 0.8).astype(np.float32),
                 np.arange(data.batch, dtype=np.int32), images)


@cache
def weights_of(model: configs.Model) -> dict[str, np.ndarray]:
    found = verify.make_sharded(configs.Config(model=model)).init(3)
    return {name: np.asarray(value) + 0.4 * name.endswith("gate") for name, value in found.items()}


@cache
def gradients(config: configs.Config):
    sharded = verify.make_sharded(config)
    weights = jax.device_put(weights_of(config.model), sharded.shardings)
    batch = on_mesh(sharded.mesh, batch_of(config.data))
    found, figures = jax.jit(make_gradients(sharded))(weights, batch, jax.random.key(1))
    return jax.device_get((found, figures.loss))


@cache
def evaluated(config: configs.Config) -> float:
    sharded = verify.make_sharded(config)
    weights = jax.device_put(weights_of(config.model), sharded.shardings)
    loss, count = make_evaluation(sharded)(weights, on_mesh(sharded.mesh, batch_of(config.data)))
    return float(loss / count)


@pytest.mark.parametrize("mesh, freeze", [*((mesh, "") for mesh in MESHES), ("d2e2t2", "text,encoder"), *(
    (mesh, "text") for mesh in ("p2f2 full", "p4 zero bubble", "p2e2 chunks"))])
def test_the_numbers_are_those_of_one_device(mesh, freeze):
    config = make(*SEES, *MESHES[mesh], f"train.freeze={freeze}")
    plain = verify.single(make(*SEES))
    expected, loss = gradients(plain)
    found, here = gradients(config)
    np.testing.assert_allclose(here, loss, rtol=verify.LOSS)
    if mesh == "p2t2":
        np.testing.assert_allclose(evaluated(config), evaluated(plain), rtol=verify.LOSS)
    frozen = [name for name in expected if name not in found]
    groups = {group(name) for name in frozen}
    assert groups == set(filter(None, freeze.split(",")))
    worst = {name: verify.gap(expected[name], found[name]) for name in found}
    assert max(worst.values()) <= verify.GRADIENT, worst


def test_for_frozen_weights_nothing_is_kept():
    """Neither moments in the state nor gradients among the results of the compiled step."""
    whole, frozen = (verify.make_sharded(make(*SEES, f"train.freeze={names}")) for names in ("", "text,encoder"))
    states = []
    for sharded in (whole, frozen):
        optimizer = make_optimizer(sharded.config.optimizer, 10, trained(sharded, sharded.axes))
        states.append(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(sharded, optimizer).optimizer)))
    moving = sum(np.prod(shape) for shape in trained(frozen, frozen.shapes).values())
    assert states[1] == 2 * moving + 2 < states[0] / 3  # two moments of each, and two counts of steps
    sizes = []
    for sharded in (whole, frozen):
        weights = jax.device_put(weights_of(sharded.config.model), sharded.shardings)
        batch = on_mesh(sharded.mesh, batch_of(sharded.config.data))
        compiled = jax.jit(make_gradients(sharded)).lower(weights, batch, jax.random.key(0)).compile()
        sizes.append(compiled.memory_analysis().output_size_in_bytes)
    assert 4 * moving <= sizes[1] <= 4 * moving + 4096 < sizes[0] / 2  # figures beside the gradients


def documents(folder) -> str:
    from PIL import Image

    lines = []
    for i in range(24):
        Image.new("RGB", (20, 14), (10 * i, 255 - 10 * i, 60)).save(folder / f"{i}.png")
        lines.append(json.dumps({"parts": [{"image": f"{i}.png"}, {"text": f"colour {i}"}]}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return str(folder / "documents.jsonl")


def stage(folder, name: str, *overrides: str) -> configs.Config:
    config = make(*overrides, f"data.sources={documents(folder)}", f"data.cache={folder / 'cache'}", "train.steps=2",
                  "data.validation=0.2", "train.eval_batches=1", f"run_dir={folder / name}", "checkpoint.every=2")
    config = configs.put(config, ["mesh", "fake_devices"], config.mesh.devices())
    train(config)
    return config


def weights(folder) -> dict[str, np.ndarray]:
    return jax.device_get(moejax.load(folder).weights)


def test_stages_begin_with_one_another(tmp_path):
    stage(tmp_path, "text", *TEXT)
    told = f"train.init={tmp_path / 'text'}"
    stage(tmp_path, "frozen", *SEES, told, "train.freeze=text", "optimizer.lr=0.01")
    text, frozen = weights(tmp_path / "text"), weights(tmp_path / "frozen")
    # V and M alternate there, in stacks of their own
    for name in ("attention.q", "feed.up", "feed.router"):
        both = np.stack([frozen[f"runs.0.0.{name}"], frozen[f"runs.0.1.{name}"]], 1)
        np.testing.assert_array_equal(both.reshape(text[f"runs.0.0.{name}"].shape), text[f"runs.0.0.{name}"])
    np.testing.assert_array_equal(frozen["embedding"], text["embedding"])
    assert np.abs(frozen["runs.0.0.cross.gate"]).max() > 0
    records = [json.loads(line) for line in (tmp_path / "frozen" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["images_skipped"] == 0 and 0 <= records[-1]["input_share"] < 1

    staged = ("mesh.pipeline=2", "mesh.tensor=2", "train.microbatches=2")
    found = jax.device_get(beginning(verify.make_sharded(make(*SEES, f"train.init={tmp_path / 'frozen'}", *staged))))
    assert all(np.array_equal(found[name], frozen[name]) for name in frozen) and found.keys() == frozen.keys()
    stage(tmp_path, "all", *SEES, f"train.init={tmp_path / 'frozen'}", "mesh.tensor=2")
    assert not np.array_equal(weights(tmp_path / "all")["embedding"], text["embedding"])
    loaded = moejax.load(tmp_path / "frozen", ["model.pattern=M", "model.vision=", "model.cross=", "data.images=0"])
    assert all(np.array_equal(loaded.weights[name], text[name]) for name in text)
    with pytest.raises(ConfigError, match="lacks"):
        moejax.load(tmp_path / "frozen", ["model.pattern=VMM"])
    back = make(*TEXT, f"train.init={tmp_path / 'frozen'}")
    found = jax.device_get(beginning(verify.make_sharded(back)))
    assert all(np.array_equal(found[name], text[name]) for name in text) and found.keys() == text.keys()


def test_a_run_begins_with_what_several_have(tmp_path, capsys):
    stage(tmp_path, "text", *TEXT)
    other = make(*SEES, "train.seed=9", "model.layers=0", "model.cross=", "data.images=0")
    folder = tmp_path / "encoder"
    folder.mkdir()
    sharded = verify.make_sharded(other)
    write_weights(configs.put(other, ["run_dir"], str(folder)), sharded.init(9))
    (folder / "config.json").write_text(configs.to_json(other))
    config = make(*SEES, f"train.init={tmp_path / 'text'},{folder}")
    found = jax.device_get(beginning(verify.make_sharded(config)))
    text, encoder = weights(tmp_path / "text"), jax.device_get(sharded.init(9))
    np.testing.assert_array_equal(found["head"], text["head"])
    np.testing.assert_array_equal(found["vision.encoder.patch"], encoder["vision.encoder.patch"])
    assert "start fresh (cross, resampler)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"a model like its own; in .*embedding has \(264, 40\), and"):
        beginning(verify.make_sharded(make(*SEES, "model.d_model=48", f"train.init={tmp_path / 'text'}")))
    with pytest.raises(ConfigError, match=r"has none; take it out of train\.init"):
        beginning(verify.make_sharded(make(*TEXT, f"train.init={folder}")))
    with pytest.raises(ConfigError, match="training needs a model with layers"):
        train(configs.put(other, ["run_dir"], str(tmp_path / "no")))

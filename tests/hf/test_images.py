"""Image encoders and models that look at images: the numbers of transformers, on any mesh, and back to the bit.

tests/hf/make.py makes the fixtures and says what is in them; clip_vision and idefics came with keys of their own.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moejax
from moejax import config as configs
from moejax.api import export_run, import_folder
from moejax.config import Config, ConfigError, Data, Model
from moejax.data.batch import Images
from moejax.hf import convert
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import axes, mesh as meshes
from moejax.train import checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLOSE = 1e-4  # as in conftest
RENAMED = {"pixel_values": "pixels", "last_hidden_state": "hidden", "pooler_output": "pooled",
           "final_norm": "hidden_last", "image_attention_mask": "looks", "image_hidden_states": "image_hidden"}
ENCODERS = ["clip", "clip_vision", "clip_vision_gelu", "siglip", "siglip_vision", "siglip_vision_plain"]
READERS = ["idefics", "idefics_plain", "idefics_vector"]
MESHES = [["mesh.data=2", "mesh.tensor=2", "mesh.fsdp=2"], ["mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=2"]]


def settings(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


@cache
def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "reference.npz") as file:
        return {RENAMED.get(key, key): value for key, value in file.items()}


def close(got, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=CLOSE)


def pixels(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, -3, -1)


def images(found: dict[str, np.ndarray]) -> Images:
    frames = pixels(found["pixels"])[:, :, None]
    return Images(frames, np.ones(frames.shape[:2], np.int32), found["looks"] == 1)


def twice(tree):
    return jax.tree.map(lambda x: np.concatenate([x, x]), tree)


# The numbers


@pytest.mark.parametrize("name", ENCODERS)
def test_what_an_encoder_sees(name):
    found, expected = moejax.load(FIXTURES / name).see(pixels(reference(name)["pixels"])), reference(name)
    close(found.hidden, expected["hidden"])
    assert (found.pooled is None) == ("pooled" not in expected) == (name == "siglip_vision_plain")
    if found.pooled is not None:
        close(found.pooled, expected["pooled"])


@pytest.mark.parametrize("name", ENCODERS)
def test_what_an_encoder_sees_on_a_mesh(name):
    model, expected = moejax.load(FIXTURES / name, MESHES[0]), reference(name)
    count = 4 * (len(expected["pixels"]) // 2)  # of images, for four batch shards
    found = model.see(np.resize(pixels(expected["pixels"]), (count, *pixels(expected["pixels"]).shape[1:])))
    close(found.hidden, np.resize(expected["hidden"], (count, *expected["hidden"].shape[1:])))


@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_layer_by_layer(layers, tmp_path):
    values = load_file(FIXTURES / "clip_vision" / "model.safetensors")
    kept = {key: value for key, value in values.items() if not any(
        key.startswith(f"encoder.layers.{i}.") for i in range(layers, 3))}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings("clip_vision") | {"num_hidden_layers": layers}))
    expected = reference("clip_vision")
    close(moejax.load(tmp_path).see(pixels(expected["pixels"])).hidden, expected[f"hidden_states_{layers}"])


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "clip_vision"])
def test_positions_stretched_over_a_larger_image(name):
    """transformers' interpolate_pos_encoding: the learned positions are of 4 by 4 patches, the image has 6 by 6."""
    old, expected = moejax.load(FIXTURES / name).config.model, reference(name)
    side = expected["large_pixels"].shape[-1]
    larger = old.vision.replace(f"size={old.encoder().size}", f"size={side} grid=4")
    found = moejax.load(FIXTURES / name, [f"model.vision={larger}"]).see(pixels(expected["large_pixels"]))
    close(found.hidden, expected["large_hidden"])
    if "large_pooled" in expected:
        close(found.pooled, expected["large_pooled"])


def test_bytes_are_normalised():
    model = moejax.load(FIXTURES / "siglip_vision")
    raw = np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3), np.uint8)
    close(model.see(raw).hidden, np.asarray(model.see(((raw / 255 - 0.5) / 0.5).astype(np.float32)).hidden))


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_says(name):
    model, expected = moejax.load(FIXTURES / name), reference(name)
    out = model(expected["input_ids"], images(expected))
    close(out.logits, expected["logits"])
    close(out.hidden, expected["hidden_last"])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_says_on_a_mesh(name, mesh):
    model, expected = moejax.load(FIXTURES / name, mesh), reference(name)
    out = model(np.tile(expected["input_ids"], (2, 1)), twice(images(expected)))
    close(out.logits, np.tile(expected["logits"], (2, 1, 1)))


def test_a_padded_batch():
    """Padding is on the right, so that what comes before does not see it."""
    model, expected = moejax.load(FIXTURES / "idefics"), reference("idefics")
    mask = expected["attention_mask_padded"] == 1
    assert mask.sum() == 48 - 7
    close(model(expected["input_ids_padded"], images(expected)).logits[mask], expected["logits_padded"][mask])


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_looks_at(name):
    model, expected = moejax.load(FIXTURES / name), reference(name)
    rows, sharded = axes.rows(model.sharded.mesh.shape), model.sharded

    def device(values, seen):
        return sharded.build(values).see(seen, sharded.run(sequence=False, remat="none")).values

    found = jax.jit(sharded.program(device, (rows,), rows))(model.weights, on_mesh(sharded.mesh, images(expected)))
    close(found, expected["image_hidden"])


def test_a_reader_layer_by_layer():
    """Also after every gated cross-attention, which is a module of its own in transformers."""
    model, expected = moejax.load(FIXTURES / "idefics"), reference("idefics")
    rows, sharded = axes.rows(model.sharded.mesh.shape), model.sharded

    def device(values, tokens, seen):
        found, run, outs = sharded.build(values), sharded.run(sequence=False, remat="none"), {}
        x, sight = found.embed(tokens, run), found.see(seen, run)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        for i in range(4):
            block = jax.tree.map(lambda each, i=i: each[i // 2], found.runs[0][i % 2])  # two stacks of two
            if block.cross is not None:
                outs[f"xattn_block_{i // 2}_out"] = block.cross(x, sight, run)
            x = outs[f"layer_{i}_out"] = block(x, positions, run, None, sight)[0]
        return outs

    names = [f"xattn_block_{i}_out" for i in range(2)] + [f"layer_{i}_out" for i in range(4)]
    found = jax.jit(sharded.program(device, (rows, rows), dict.fromkeys(names, rows)))(
        model.weights, *on_mesh(sharded.mesh, (expected["input_ids"], images(expected))))
    for name in names:
        close(found[name], expected[name])


# There and back


@pytest.mark.parametrize("name", [*ENCODERS[1:3], *ENCODERS[4:], *READERS])
def test_there_and_back(name, tmp_path, exported):
    exported(FIXTURES / name, tmp_path)


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_names_come_back_as_they_were(name, dtype, tmp_path, exported, tensors):
    """Older versions write them with a prefix."""
    values = load_file(FIXTURES / name / "model.safetensors")
    old = tmp_path / "old"
    shutil.copytree(FIXTURES / name, old)
    save_file({f"vision_model.{key}": value for key, value in values.items()}, old / "model.safetensors")
    exported(old, tmp_path)
    for folder, prefix in ((old, "vision_model."), (FIXTURES / name, "")):
        export_run(folder, tmp_path / f"to{prefix}", dtype)
        assert sorted(tensors(tmp_path / f"to{prefix}")) == sorted(prefix + key for key in values)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_half_of_a_whole_model(name, tmp_path, tensors, capfd):
    import_folder(FIXTURES / name, tmp_path / "run")
    before = tensors(FIXTURES / name)
    kept = {key: value for key, value in before.items() if key.startswith("vision_model.")}
    assert f"{len(before) - len(kept)} tensors of {FIXTURES / name} are no part of the model and were left out" in (
        capfd.readouterr().err)
    export_run(tmp_path / "run", tmp_path / "out")
    assert tensors(tmp_path / "out") == kept
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == f"{name}_vision_model" and written["image_size"] == 30
    assert written["architectures"] == [{"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[name]]
    close(moejax.load(tmp_path / "out").see(pixels(reference(name)["pixels"])).hidden, reference(name)["hidden"])


def test_how_images_are_made_ready(tmp_path):
    shutil.copytree(FIXTURES / "clip_vision", tmp_path / "clip")
    given = {"do_center_crop": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 0.25]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(given))
    told = moejax.load(tmp_path / "clip").config.model.encoder()
    assert (told.fit, told.mean, told.std) == ("squash", (0.1, 0.2, 0.3), (1.0, 2.0, 0.25))
    import_folder(tmp_path / "clip", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == given
    for wrong, problem in [
            ({"rescale_factor": 1 / 127.5}, "bytes of pixels are divided by 255 here; "),
            ({"image_mean": [1, 2]}, "mean= of model.vision takes three numbers; got '1,2'"),
            ({"image_std": [0] * 3}, "std= of model.vision takes three numbers above 0; got '0,0,0'"),
            ({"image_std": 1}, "got '1'"),
            ({"image_mean": "grey one"}, "model.vision ")]:
        (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError) as caught:
            moejax.load(tmp_path / "clip")
        assert problem in caught.value.problems[0]


SMALL = "size=20 patch=7 width=16 layers=2 heads=2 hidden=24"
READER = Model(layers=4, pattern="WD", d_model=24, heads=4, kv_heads=4, head_dim=6, hidden=20, vocab=264,
               vision=f"clip {SMALL} act=gelu_exact", cross="last feed=every latents=3 depth=2 heads=2 head=6")
NATIVE = {
    "clip_vision_model": Model(layers=0, vision=f"clip {SMALL}"),
    "siglip_vision_model": Model(layers=0, vision=f"siglip {SMALL} pool=1"),
    "idefics": READER}


def native(model: Model, folder: Path) -> moejax.api.Model:
    config = Config(name="native", run_dir=str(folder), model=model, data=Data(batch=1, tokenizer=""))
    meshes.start(config.mesh)
    sharded = Sharded(config, meshes.make_mesh(config.mesh, jax.devices()[:1]))
    weights = sharded.init(0)
    checkpoint.write_weights(config, weights)
    (folder / "config.json").write_text(configs.to_json(config))
    return moejax.load(folder)


@pytest.mark.parametrize("family", NATIVE)
def test_a_native_model_comes_out(family, tmp_path):
    (tmp_path / "run").mkdir()
    ours = native(NATIVE[family], tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out")["family"] == family
    theirs = moejax.load(tmp_path / "out")
    assert not convert.unlike(ours.config.model, theirs.config.model)
    assert theirs.weights.keys() == ours.weights.keys()
    for name, value in ours.weights.items():
        np.testing.assert_array_equal(value, theirs.weights[name])


@pytest.mark.parametrize("change, problem", [
    (dict(pattern="VD"), "model.pattern='VDVD' (it has 'WDWD')"),
    (dict(cross=READER.cross.replace("every", "seen")), "model.cross.feed='seen' (it has 'every')"),
    (dict(cross=READER.cross + " frames=4"), "model.cross.frames=4 (it has 1)"),
    (dict(cross=READER.cross.replace("last", "all")), "model.cross='all' (it has 'last')"),
    (dict(vision=f"siglip {SMALL}"), "model.vision='siglip' (it has 'clip')"),
    (dict(vision=f"clip {SMALL} grid=3"), "model.vision.grid=3 (it has 2)"),
    (dict(kv_heads=2), "model.kv_heads=2 (it has 4)"),
])
def test_what_no_family_can_say(change, problem):
    with pytest.raises(ConfigError) as caught:
        convert.family_of(configs.dataclasses.replace(READER, **change), 64)
    assert any(f"idefics comes nearest, and cannot express {problem}" in each for each in caught.value.problems)


def test_a_text_family_cannot_say_that_it_sees():
    model = configs.dataclasses.replace(READER, vision="", cross="", pattern="D")
    found = convert.family_of(model, 64)
    assert found["model_type"] == "llama" and not convert.lacks(found, model)
    assert convert.lacks(found, configs.dataclasses.replace(model, vision=READER.vision))


# What is wrong


@pytest.fixture
def changed(tmp_path):
    """changed(name, key={...} or value): the problems of a fixture whose config.json is changed."""

    def load(name: str, drop: tuple[str, ...] = (), **change) -> list[str]:
        shutil.copytree(FIXTURES / name, tmp_path / "bad")
        found = settings(name)
        for key, value in change.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
        (tmp_path / "bad" / "config.json").write_text(json.dumps(found))
        values = load_file(tmp_path / "bad" / "model.safetensors")
        save_file({key: value for key, value in values.items() if key not in drop}, tmp_path / "bad/model.safetensors")
        with pytest.raises(ConfigError) as caught:
            moejax.load(tmp_path / "bad")
        return [each.replace(str(tmp_path / "bad"), "HERE") for each in caught.value.problems]

    return load


def test_wrong_values_in_the_config(changed):
    assert changed("idefics", vision_config={"hidden_act": "tanh", "image_size": [28, 28], "layer_norm_eps": "small"},
                   perceiver_config={"resampler_depth": 0}, alpha_type="matrix", qk_layer_norms=1,
                   cross_layer_interval=3) == [
        "cross_layer_interval must divide num_hidden_layers here; config.json has 3 and 4",
        "alpha_type can be 'float' or 'vector' here; config.json has 'matrix'",
        "config.json must hold true or false, as qk_layer_norms; it has 1",
        "config.json must hold a whole number, 1 or more, as perceiver_config.resampler_depth; it has 0",
        "vision_config.hidden_act can be 'gelu' or 'quick_gelu' or 'gelu_pytorch_tanh' or 'gelu_new' or 'relu' here; "
        "config.json has 'tanh'",
        "config.json must hold a whole number, 1 or more, as vision_config.image_size; it has [28, 28]",
        "config.json must hold a number above 0, as vision_config.layer_norm_eps; it has 'small'"]


@pytest.mark.parametrize("value", [3, "text", [1]])
@pytest.mark.parametrize("name", ["clip", "idefics"])
def test_a_part_that_is_no_object(name, value, changed):
    assert f"config.json must hold a JSON object, as vision_config; it has {value!r}" in changed(
        name, vision_config=value)


def test_one_colour(changed):
    assert changed("clip_vision", num_channels=1) == ["num_channels can be 3 here; config.json has 1"]


def test_a_patch_larger_than_the_image(changed):
    problem, = changed("clip_vision", patch_size=33)
    assert "patch=33" in problem and "size=32" in problem


def test_missing_and_wrong_tensors(changed):
    problems = changed("idefics", drop=("lm_head.additional_fc.weight", "model.vision_model.embeddings.class_embedding",
                                        "model.perceiver_resampler.latents"), alpha_type="vector")
    shape = "must have shape [1, 1, 48]; it has [1], in HERE"
    assert problems == [
        "lm_head.additional_fc.weight of shape [4, 48] is missing, in HERE",
        *(f"model.gated_cross_attn_layers.{i}.alpha_{name} {shape}" for i in range(2)
          for name in ("cross_attn", "dense")),
        "model.perceiver_resampler.latents of shape [6, 32] is missing, in HERE",
        "model.vision_model.embeddings.class_embedding of shape [32] is missing, in HERE"]


def test_tokens_for_an_encoder_and_images_for_none():
    with pytest.raises(ConfigError, match="tokens are for a model with layers; this is an image encoder"):
        moejax.load(FIXTURES / "clip_vision")(np.zeros((1, 4), np.int32))
    with pytest.raises(ConfigError, match="images are for a model that sees"):
        moejax.load(FIXTURES / "llama").see(np.zeros((1, 8, 8, 3), np.uint8))
    model = moejax.load(FIXTURES / "clip_vision", ["mesh.data=2"])
    with pytest.raises(ConfigError) as caught:
        model.see(np.zeros((3, 8, 8, 3), np.uint8))
    assert caught.value.problems == [
        "images have shape (32, 32, 3) as model.vision says; got (8, 8, 3); resize them",
        "the number of images must be a multiple of the mesh's batch shards; got 3 and 2; pad them, or load with "
        "mesh.data=1"]

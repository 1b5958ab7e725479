"""Imported checkpoints compute what Hugging Face transformers computed of them, on any mesh, and come back to the bit.

tests/hf/make.py makes the fixtures and says what is in them.
"""

import json
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moejax
from moejax.data.batch import Batch
from moejax.hf import convert
from moejax.model.sharded import on_mesh
from moejax.serve.generate import generate_tokens
from moejax.train.step import make_gradients

FIXTURES = Path(__file__).parents[1] / "fixtures"
LOGITS = 1e-4  # as in conftest


def text_models() -> list[str]:
    """The folders with a checkpoint of a language model."""
    configs = {path.parent: json.loads(path.read_text()) for path in FIXTURES.glob("*/config.json")}
    return sorted(path.name for path, config in configs.items() if config["architectures"][0].endswith("ForCausalLM"))


NAMES = text_models()
SPARSE = [name for name in NAMES if not name.startswith(("llama", "mistral"))]
PADDED = ["llama", "mixtral_gqa", "qwen3_moe"]


def settings(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


@cache
def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "reference.npz") as file:
        return dict(file)


def test_every_family_is_here():
    assert {settings(name)["model_type"] for name in NAMES} == {
        "deepseek_v3", "gpt_oss", "granitemoe", "llama", "mistral", "mixtral", "olmoe", "phimoe", "qwen2_moe",
        "qwen3_moe"}
    assert {settings(name)["rope_parameters"]["rope_type"] for name in NAMES} == {
        "default", "linear", "dynamic", "llama3", "yarn"}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers(name, agrees):
    agrees(moejax.load(FIXTURES / name), reference(name))


def on_a_mesh(name: str) -> moejax.api.Model:
    axes = ("expert", "tensor", "fsdp") if name in SPARSE else ("data", "tensor", "fsdp")
    return moejax.load(FIXTURES / name, [f"mesh.{axis}=2" for axis in axes])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_on_a_mesh(name):
    model, expected = on_a_mesh(name), reference(name)
    out = model(np.tile(expected["input_ids"], (2, 1)))
    np.testing.assert_allclose(out.logits, np.tile(expected["logits"], (2, 1, 1)), rtol=0, atol=LOGITS)


def test_a_mesh_with_a_pipeline(tmp_path):
    """It is for training: a load uses the devices of one stage, an import keeps the mesh in the run's config."""
    expected = reference("mixtral_gqa")
    model = moejax.load(FIXTURES / "mixtral_gqa", ["mesh.pipeline=2", "mesh.tensor=2"])
    np.testing.assert_allclose(model(expected["input_ids"]).logits, expected["logits"], rtol=0, atol=LOGITS)
    moejax.api.import_folder(FIXTURES / "mixtral_gqa", tmp_path / "run", ["mesh.pipeline=2"])
    assert moejax.load_config(tmp_path / "run" / "config.json").mesh.pipeline == 2
    np.testing.assert_array_equal(*(each.weights["embedding"] for each in (model, moejax.load(tmp_path / "run"))))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mistral"])
def test_the_same_tokens_on_a_mesh(name):
    """With latent attention, with and without windows, of which the caches differ."""
    model, expected = on_a_mesh(name), reference(name)
    new = generate_tokens(model.sharded, model.weights, expected["input_ids"].tolist(), 4)
    assert new == expected["gen_tokens"][:, :4].tolist()


@pytest.mark.parametrize("name", PADDED)
def test_prompts_of_different_lengths(name):
    """The reference has them padded on the left, with positions from 0 at the first real token."""
    model, expected = moejax.load(FIXTURES / name), reference(name)
    masks = expected["gen_leftpad_attention_mask"] == 1
    prompts = [row[mask].tolist() for row, mask in zip(expected["gen_leftpad_input_ids"], masks, strict=True)]
    assert len({len(prompt) for prompt in prompts}) == 2
    new = generate_tokens(model.sharded, model.weights, prompts, expected["gen_leftpad_tokens"].shape[1])
    assert new == expected["gen_leftpad_tokens"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, tmp_path, exported):
    exported(FIXTURES / name, tmp_path)


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "mixtral_gqa"])
def test_there_and_back_in_bfloat16(name, tmp_path, exported, tensors):
    """As checkpoints are published; nothing is rounded on the way."""
    values = load_file(FIXTURES / name / "model.safetensors")
    values = {key: value.astype(ml_dtypes.bfloat16) for key, value in values.items()}
    folder = write(tmp_path / "bfloat16", settings(name) | {"dtype": "bfloat16"}, values)
    assert {kind for kind, _, _ in tensors(folder).values()} == {"BF16"}
    exported(folder, tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral_gqa"])
def test_many_files_are_as_one(name, tmp_path, agrees):
    """With model.safetensors.index.json, and the experts of one layer in both files."""
    values = load_file(FIXTURES / name / "model.safetensors")
    names = sorted(values)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({key: values[key] for key in part}, tmp_path / file)
    index = {key: file for file, part in parts.items() for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(settings(name)))
    agrees(moejax.load(tmp_path), reference(name))


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", [
    "llama", "llama_linear", "llama_dynamic", "llama_llama3", "llama_yarn", "gpt_oss", "deepseek_v3"])
def test_a_config_as_older_versions_wrote_it(name, key, tmp_path):
    """rope_theta and rope_scaling in place of rope_parameters, torch_dtype in place of dtype."""
    config = settings(name)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else rope | {key: kind}
    folder = write(tmp_path / "old", config, load_file(FIXTURES / name / "model.safetensors"))
    assert moejax.load(folder).config.model == moejax.load(FIXTURES / name).config.model


def test_sent_to_devices_layer_by_layer(monkeypatch):
    """As to a GPU: never a whole stack of layers on the host."""
    monkeypatch.setattr(convert, "IN_PLACE", ())
    apart = on_a_mesh("qwen3_moe").weights
    monkeypatch.undo()
    for name, value in on_a_mesh("qwen3_moe").weights.items():
        np.testing.assert_array_equal(apart[name], value)
        assert apart[name].sharding == value.sharding


def test_the_gradient_of_a_dense_model():
    """Of the mean loss over the tokens of a batch whose second row ends in padding."""
    model, expected = moejax.load(FIXTURES / "llama"), reference("llama")
    tokens, mask = expected["input_ids_padded"], expected["attention_mask_padded"]
    targets, counts = np.roll(tokens, -1, 1), np.roll(mask, -1, 1).astype(np.float32)
    counts[:, -1] = 0  # nothing follows
    batch = Batch(tokens.astype(np.int32), targets.astype(np.int32), counts, np.arange(2, dtype=np.int32))
    gradients, figures = jax.jit(make_gradients(model.sharded))(
        model.weights, on_mesh(model.sharded.mesh, batch), jax.random.key(0))
    np.testing.assert_allclose(figures.loss, expected["loss_padded"], rtol=1e-6)
    wanted = convert.tensors(convert.entries_of(settings("llama")), model.sharded)
    for name, tensor in wanted.items():
        found = convert.fetch(gradients, tensor, model.config.model)
        norm = expected[f"gradnorm_padded/{name}"]
        np.testing.assert_allclose(np.linalg.norm(found), norm, rtol=1e-4)
        if f"grad_padded/{name}" in expected:
            assert np.linalg.norm(found - expected[f"grad_padded/{name}"]) <= 1e-4 * norm

"""Comparing what moejax computes from a checkpoint with what its reference says."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from safetensors import safe_open

import moejax
from moejax.api import Model, export_run, import_folder
from moejax.model.transformer import Output
from moejax.serve.generate import generate_tokens

LOGITS = 1e-4  # float32 against float64 is at most 1e-5 off; a wrong norm epsilon is more than 1e-3 off
WEIGHTS = LOSS = 1e-5


@pytest.fixture(scope="session")
def agrees() -> Callable[[Model, dict[str, np.ndarray]], None]:
    """agrees(model, reference): logits, hidden states, routing, balance loss and greedy tokens are the reference's."""

    def compare(model: Model, reference: dict[str, np.ndarray]) -> None:
        out = model(reference["input_ids"])
        close(out.logits, reference["logits"], LOGITS)
        close(out.hidden, last_hidden(reference), LOGITS)
        same_routing(out.routing, reference)
        if "aux_loss" in reference:
            close(balance_loss(out), reference["aux_loss"], LOSS)
        new = generated(model, reference.get("gen_input", reference["input_ids"]), reference["gen_tokens"].shape[1])
        assert new == reference["gen_tokens"].tolist()

    return compare


def close(got, expected: np.ndarray, tolerance: float) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def balance_loss(output: Output) -> Array:
    """As transformers counts it: over all layers' tokens at once, and k where it is balanced."""
    load, share = output.losses.load, output.losses.share
    chosen = jnp.sum(load, 0) / (jnp.sum(load) / output.routing.expert.shape[-1])
    return load.shape[1] * jnp.sum(chosen * jnp.mean(share, 0))


def last_hidden(reference: dict[str, np.ndarray]) -> np.ndarray:
    if "hidden_last" in reference:
        return reference["hidden_last"]
    layers = 0
    while f"hidden_states_{layers + 1}" in reference:
        layers += 1
    return reference[f"hidden_states_{layers}"]


def same_routing(routing, reference: dict[str, np.ndarray]) -> None:
    """The same experts with the same weights for every token; their order does not matter."""
    count = sum(name.startswith("router_topk_index_") and "padded" not in name for name in reference)
    assert (0 if routing is None else len(routing.expert)) == count
    for layer in range(count):
        expected, weight = (reference[f"router_topk_{kind}_{layer}"] for kind in ("index", "weights"))
        found = np.asarray(routing.expert[layer]).reshape(expected.shape)
        order, wanted = np.argsort(found, -1), np.argsort(expected, -1)
        np.testing.assert_array_equal(*(np.take_along_axis(*each, -1) for each in ((found, order), (expected, wanted))))
        got = np.asarray(routing.weight[layer]).reshape(weight.shape)
        close(np.take_along_axis(got, order, -1), np.take_along_axis(weight, wanted, -1), WEIGHTS)


def generated(model: Model, prompts, new: int) -> list[list[int]]:
    return generate_tokens(model.sharded, model.weights, [np.asarray(each).tolist() for each in prompts], new)


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """tensors(folder): name -> (dtype, shape, bytes) of all its .safetensors files."""

    def read(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                assert not found.keys() & set(file.keys())
            found |= parse(path.read_bytes())
        return found

    return read


def parse(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Of one file: 8 bytes with the length of the header, a header in JSON, and the tensors' bytes."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: (each["dtype"], tuple(each["shape"]), data[start + each["data_offsets"][0]:][
        :each["data_offsets"][1] - each["data_offsets"][0]]) for name, each in header.items()}


@pytest.fixture(scope="session")
def exported(tensors) -> Callable[[Path, Path], Path]:
    """exported(folder, place): imported and exported again, with the same tensors and no setting changed."""

    def there_and_back(folder: Path, place: Path) -> Path:
        import_folder(folder, place / "run")
        export_run(place / "run", place / "out")
        before, after = tensors(folder), tensors(place / "out")
        assert sorted(after) == sorted(before)
        assert [name for name in before if after[name] != before[name]] == []
        old, new = (json.loads((each / "config.json").read_text()) for each in (folder, place / "out"))
        assert new["model_type"] == old["model_type"] and new["architectures"] == old["architectures"]
        assert {key: (old[key], new[key]) for key in old.keys() & new.keys() if old[key] != new[key]} == {}
        assert moejax.load(place / "out").config.model == moejax.load(folder).config.model
        return place / "out"

    return there_and_back

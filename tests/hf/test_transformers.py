"""Fresh checkpoints of every family against Hugging Face transformers itself, where it is installed, and back."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax.api import export_run, import_folder
from moejax.data.batch import Images

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # what they warn of is theirs
LOGITS = 1e-4  # as in conftest


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


make = module(Path(__file__).parent / "make.py")
NATIVE, native = (getattr(module(Path(__file__).parent / "test_images.py"), name) for name in ("NATIVE", "native"))


@pytest.mark.parametrize("name", make.CASES)
def test_a_fresh_checkpoint(name, tmp_path, agrees, exported):
    make.make(name, tmp_path / "made", seed=1000, vocab_size=136, hidden_size=48, intermediate_size=24)
    with np.load(tmp_path / "made" / "reference.npz") as file:
        reference = dict(file)
    agrees(moejax.load(tmp_path / "made"), reference)
    # what we wrote is a checkpoint to them, and says the same
    theirs = make.load(exported(tmp_path / "made", tmp_path))
    with torch.no_grad():
        logits = theirs(torch.tensor(reference["input_ids"], dtype=torch.int64), use_cache=False).logits.numpy()
    ours = moejax.load(tmp_path / "out")(reference["input_ids"]).logits
    np.testing.assert_allclose(ours, logits, rtol=0, atol=LOGITS)
    np.testing.assert_array_equal(logits, reference["logits"])


def ours(folder: Path, reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What we compute from a checkpoint, by the keys of the reference."""
    model, pixels = moejax.load(folder), np.moveaxis(reference["pixels"], -3, -1)
    if "input_ids" not in reference:
        return {key: value for key, value in model.see(pixels)._asdict().items() if value is not None}
    seen = Images(pixels[:, :, None], np.ones(pixels.shape[:2], np.int32), reference["looks"] == 1)
    return {"logits": model(reference["input_ids"].astype(np.int32), seen).logits}


@pytest.mark.parametrize("name", make.IMAGES)
def test_a_fresh_checkpoint_that_sees(name, tmp_path):
    make.make_images(name, tmp_path / "made", seed=1000)
    with np.load(tmp_path / "made" / "reference.npz") as file:
        reference = dict(file)
    import_folder(tmp_path / "made", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    for folder in (tmp_path / "made", tmp_path / "out"):
        for key, value in ours(folder, reference).items():
            np.testing.assert_allclose(value, reference[key], rtol=0, atol=LOGITS)
    same_as_theirs(tmp_path / "out", reference, exact=True)


@pytest.mark.parametrize("family", NATIVE)
def test_a_native_model_that_sees(family, tmp_path):
    """Fresh weights, written as a checkpoint: to transformers it is one, and says the same."""
    run = tmp_path / "run"
    run.mkdir()
    model = native(NATIVE[family], run)
    export_run(run, tmp_path / "out")
    size, draw = NATIVE[family].encoder().size, np.random.default_rng(0)
    inputs = {"pixels": draw.normal(size=(2, 3, size, size)).astype(np.float32)}
    if model.config.model.layers:
        inputs = {"input_ids": draw.integers(0, 264, (2, 8)), "looks": draw.integers(0, 2, (2, 8, 2)),
                  "pixels": draw.normal(size=(2, 2, 3, size, size)).astype(np.float32)}
    same_as_theirs(tmp_path / "out", inputs | ours(run, inputs), exact=False)


def same_as_theirs(folder: Path, reference: dict[str, np.ndarray], exact: bool) -> None:
    theirs = make.load_images(folder)
    if "input_ids" in reference:
        found = make.read(theirs, reference)
    else:
        found = make.look(theirs, torch.tensor(reference["pixels"]), False)
    for key in found.keys() & reference.keys():
        np.testing.assert_allclose(found[key].numpy(), reference[key], rtol=0, atol=0 if exact else LOGITS)

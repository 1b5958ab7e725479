"""Fresh checkpoints of every family against Hugging Face transformers itself, where it is installed, and back."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import moejax

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

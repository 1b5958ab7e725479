"""The README's commands and code run as written; training beyond the tiny model for a few steps."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from moejax import cli

ROOT = Path(__file__).parent.parent
FEW = ["train.steps=3", "train.eval_every=3", "train.eval_batches=1"]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for part in ("configs", "launch"):
        shutil.copytree(ROOT / part, folder / part)
    for name, fixture in (("clip-vit-large-patch14", "clip"), ("idefics-9b", "idefics")):
        shutil.copytree(ROOT / "tests" / "fixtures" / fixture, folder / name)
    # As published, but small: 8 experts, and a tokenizer of letters.
    mixtral = folder / "Mixtral-8x7B-v0.1"
    shutil.copytree(ROOT / "tests" / "fixtures" / "mixtral_gqa", mixtral)
    letters = {chr(code): code for code in range(128)}
    Tokenizer(models.BPE(letters, [])).save(str(mixtral / "tokenizer.json"))
    return folder


def test_its_commands_and_code_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = []
    for language, text in BLOCKS:
        for line in text.splitlines() if language == "bash" else []:
            command, *words = shlex.split(line, comments=True)
            if command == "make":
                assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            elif words[0] == "compile":  # for devices that this process does not have, or whose compiler is an extra
                done = subprocess.run([sys.executable, "-m", "moejax.cli", *words], capture_output=True, text=True,
                                      env={**os.environ, "PYTHONPATH": str(ROOT)})
                assert done.returncode == 0 or "pip install" in done.stderr, done.stderr
            elif command == "moejax":
                short = FEW if words[0] == "train" and words[1] != "configs/tiny.py" else []
                assert cli.main([*words, *short]) == 0, line
                ran.append(words[0])
        if language == "python":
            scope: dict = {}
            exec(text, scope)
            assert scope["output"].logits.shape[:2] == scope["tokens"].shape
            assert len(scope["texts"]) == 2
            ran.append("python")
    assert {"train", "generate", "report", "python", "import", "export"} <= set(ran)
    assert load_file(folder / "mixtral-again" / "model.safetensors").keys() == load_file(
        folder / "Mixtral-8x7B-v0.1" / "model.safetensors").keys()
    assert len((folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()) == 30


def test_its_tree_names_files_that_exist():
    tree = next(text for _, text in BLOCKS if text.startswith("moejax/"))
    named = set(re.findall(r"[a-z_]+\.py", tree))
    there = {path.name for path in (ROOT / "moejax").rglob("*.py")} - {"__init__.py"}
    assert named <= there
    # every file of the packages whose files the tree lists one by one
    assert {p.name for p in (ROOT / "moejax" / "model").glob("*.py")} - {"__init__.py"} <= named

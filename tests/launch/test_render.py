"""Pictures of texts, and how well a run reads them."""

import importlib.util
import io
import json
import random
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moejax
from moejax.config import ConfigError

LAUNCH = Path(__file__).parents[2] / "launch"


def script(name):
    """launch/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


render, transcribe = script("render"), script("transcribe")


def contents(folder):
    """Every file of a rendering but meta.json, and (kind or None, picture, text) of train and test."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
             if path.is_file() and path.name != "meta.json"}
    with tarfile.open(folder / "train.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    train = [json.loads(data)["parts"] for name, data in members.items() if name.endswith(".json")]
    test = [json.loads(line)["parts"] for line in files["test.jsonl"].splitlines()]
    pictures = members | files
    return files, *([(parts[0]["image"], Image.open(io.BytesIO(pictures[parts[0]["image"]])), parts[1]["text"])
                     for parts in each] for each in (train, test))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("render") / "pictures"
    assert render.main([str(folder), "--train", "60", "--test", "20"]) == 0
    return folder


def test_a_rendering_is_what_was_asked_for(rendered):
    _, train, test = contents(rendered)
    assert [name for name, _, _ in train] == [f"{number:06}.png" for number in range(1, 61)]
    assert len(test) == 20 and {Path(name).stem[7:] for name, _, _ in test} == {"source", "formula"}
    texts = [text for _, _, text in train + test]
    assert len(set(texts)) == 80  # so no text of the test is one of the training
    for name, picture, text in train + test:
        assert picture.size == (64, 64) and picture.mode == "RGB" and picture.format == "PNG"
        dark = (np.asarray(picture) < 128).all(2)
        assert 10 < dark.sum() < 64 * 64 / 4 and not dark[:, [0, -1]].any(), name
        assert 6 <= len(text) <= 26 and text.isascii() and 1 <= text.count("\n") + 1 <= 3


def test_the_same_seed_gives_the_same_bytes(rendered, tmp_path):
    assert render.main([str(tmp_path / "again"), "--train", "60", "--test", "20"]) == 0
    assert render.main([str(tmp_path / "other"), "--train", "60", "--test", "20", "--seed", "1"]) == 0
    assert contents(tmp_path / "again")[0] == contents(rendered)[0] != contents(tmp_path / "other")[0]
    assert {path.name for path in tmp_path.iterdir()} == {"again", "other"}


def test_once_takes_what_other_versions_made(rendered, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(rendered, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"python": "2.7"}))
    command = [str(folder), "--train", "60", "--test", "20"]
    assert render.main([*command, "--once"]) == 0 and not capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        render.main(command)
    with pytest.raises(SystemExit, match="2"):
        render.main([*command, "--once", "--seed", "1"])


def test_nothing_is_overwritten(rendered, tmp_path, capsys):
    before = contents(rendered)[0]
    assert render.main([str(rendered), "--train", "60", "--test", "20"]) == 0
    assert "holds these pictures already" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    for folder, says in ((rendered, "holds train 60, test 20; name another"), (tmp_path, "holds other files"),
                         (tmp_path / "mine.txt", "holds other files")):
        with pytest.raises(SystemExit, match="2"):
            render.main([str(folder), "--train", "61", "--test", "21"])
        assert says in capsys.readouterr().err
    assert contents(rendered)[0] == before and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("option", ["--size=47", "--size=1025", "--train=0", "--test=0"])
def test_what_cannot_be_rendered(tmp_path, option):
    with pytest.raises(SystemExit, match="2"):
        render.main([str(tmp_path / "new"), option])
    assert not any(tmp_path.iterdir())


def test_more_texts_than_there_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(render, "library", lambda: ["import os", "import sys", "import re"])
    monkeypatch.setattr(render, "TRIES", 50)
    with pytest.raises(SystemExit, match="2"):
        render.main([str(tmp_path / "new")])
    assert "no new source was found after" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_lines_are_broken_where_words_end():
    def source(*lines, most):
        draw = random.Random(0)
        draw.randint = lambda low, high: most
        draw.randrange = lambda count: 0
        return render.source(lines, draw)

    assert source("return self.x", "pass", most=3) == "return\nself.x\npass"
    assert source("return self.x", "pass", most=2) == "return\nself.x"
    assert source("unbreakable = 1", most=3) == "unbreak\nable = 1"  # a long word where the row ends


def test_what_stands_between_the_parts_of_a_formula_keeps_its_height():
    setter = render.Setter(64)
    minus, plus = setter.piece("-"), setter.piece("+")
    assert setter.piece("-") is minus  # typeset once
    line = np.flatnonzero((minus.ink > 128).any(1))
    middle = np.flatnonzero((plus.ink > 128).any(1)).mean() - plus.above
    assert len(line) <= 2 and abs(line.mean() - minus.above - middle) <= 1  # the minus is where the plus has its bar
    assert setter.formula([r"\sum_{i=0}^{n} x"] * 4) is None  # too wide


@pytest.fixture
def model(monkeypatch, rendered):
    """Stands in for a trained run: reads sources as they are, formulas but for their first character."""
    truths = {rendered / name: text for name, _, text in contents(rendered)[2]}
    calls = []

    def generate(model, prompts, max_new_tokens, temperature, images):
        calls.append((len(prompts), max_new_tokens))
        assert set(prompts) == {"<image>"} and temperature == 0 and len(images) == len(prompts)
        answers = []
        for (image,) in images:
            if isinstance(image, np.ndarray):
                assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and not image.any()
                answers.append("")
            else:
                answers.append("?" * ("formula" in image.name) + truths[image]["formula" in image.name:])
        return answers

    monkeypatch.setattr(moejax, "generate", generate, raising=False)
    monkeypatch.setattr(moejax, "load", lambda run: None, raising=False)
    monkeypatch.setattr(transcribe, "GROUP", 8)
    return calls


def test_the_transcription_of_a_run(model, rendered, tmp_path, capsys):
    kept = tmp_path / "samples.jsonl"
    kept.write_text('{"prompt": "def ", "text": "f()"}\n{"prompt": "<image>", "images": ["old.png"], "text": ""}\n')
    assert transcribe.main([str(tmp_path), str(rendered / "test.jsonl"), "--count", "20", "--json"]) == 0
    found, test = json.loads(capsys.readouterr().out), contents(rendered)[2]
    formulas = [text for name, _, text in test if "formula" in name]
    letters = sum(map(len, formulas))
    assert found["formula"] == {
        "count": len(formulas), "seen": {"characters": pytest.approx(1 - len(formulas) / letters), "texts": 0},
        "blind": {"characters": 0, "texts": 0}}
    assert found["source"]["seen"] == {"characters": 1, "texts": 1} and found["all"]["count"] == 20
    assert found["all"]["seen"]["texts"] == pytest.approx(1 - len(formulas) / 20)
    new = max(len(text) for _, _, text in test) + 1
    assert model == [(8, new)] * 6  # 3 groups of one size, twice
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert lines[0] == {"prompt": "def ", "text": "f()"} and len(lines) == 21
    assert [line["truth"] for line in lines[1:]] == [text for _, _, text in test]
    assert all(Path(line["images"][0]).is_file() and line["blind"] == "" for line in lines[1:])


def test_the_table_of_a_transcription(model, rendered, tmp_path, capsys):
    assert transcribe.main([str(tmp_path), str(rendered / "test.jsonl"), "--count", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["formula", "source", "all"]
    assert lines[3].split()[2:] == ["100.0%", "0.0%", "100.0%", "0.0%"]


def test_scores_count_positions():
    # of "abcd" a, b and d are in place; of "xy" nothing, as what was read is shifted: 3 of 6
    assert transcribe.score(["abcd", "xy"], ["abXd more", "_xy"]) == {"characters": 0.5, "texts": 0}
    assert transcribe.score(["ab"], ["ab"]) == {"characters": 1, "texts": 1}


@pytest.mark.parametrize("line", ['{"text": "x"}', "{", '{"parts": [{"image": "gone.png"}, {"text": "x"}]}', ""])
def test_documents_that_are_no_pictures_with_texts(model, tmp_path, capsys, line):
    (tmp_path / "test.jsonl").write_text(line)
    assert transcribe.main([str(tmp_path), str(tmp_path / "test.jsonl")]) == 2
    assert "transcription needs" in capsys.readouterr().err and not (tmp_path / "samples.jsonl").exists()


def test_a_run_that_is_none(rendered, tmp_path, capsys, monkeypatch):
    def load(run):
        raise ConfigError(["a run folder holds a config.json"])

    monkeypatch.setattr(moejax, "load", load, raising=False)
    assert transcribe.main([str(tmp_path), str(rendered / "test.jsonl")]) == 2
    assert "a run folder holds" in capsys.readouterr().err

"""`moejax verify` passes on sound code and fails, by name, on a wrong collective."""

import json

import pytest
from jax import lax

from moejax import cli
from moejax.config import load_config
from moejax.parallel import collectives
from moejax.train import verify as verifier

SMALL = ["model.layers=1", "model.vocab=258", "data.sequence=32", "mesh.fake_devices=0"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"line {i} {j}\n" for j in range(60)))
    return [*SMALL, f"data.sources={tmp_path}/text", f"data.cache={tmp_path}/cache"]


def only(monkeypatch, *names):
    """Of all layouts, those whose name is in `names`."""
    every = verifier.layouts
    monkeypatch.setattr(verifier, "layouts", lambda *args: [case for case in every(*args) if case[0] in names])


def misdirected(x, split, concat):
    if lax.axis_size("expert") == 1:
        return x
    return lax.all_to_all(x[::-1] if split == 0 else x, "expert", split, concat, tiled=True)


def test_every_axis_dispatcher_and_microbatching_stands_in_the_list(text):
    names = [name for name, _ in verifier.layouts(load_config("configs/tiny.py", text), 8)]
    assert {"data 8", "fsdp 8", "expert 4", "tensor 2", "data 2 × expert 2 × tensor 2", "data 4 × tensor 2 sequence",
            "data 4 × tensor 2 zero1", "one device blocked", "one device einsum", "one device microbatches 2",
            "one device microbatches 4"} <= set(names)
    assert len(names) == len(set(names))


def test_layouts_that_agree_pass(text, monkeypatch, capsys):
    only(monkeypatch, "data 8", "tensor 2", "one device blocked", "one device microbatches 2")
    assert cli.main(["verify", "configs/tiny.py", "--json", *text]) == 0
    out = capsys.readouterr()
    result = json.loads(out.out)
    assert result["passed"] and result["first"] is None
    assert [layout["layout"] for layout in result["layouts"]] == [
        "data 8", "tensor 2", "one device blocked", "one device microbatches 2"]
    assert all(layout["flips"] == 0 and layout["gradient"] < 1e-4 for layout in result["layouts"])
    assert "4 layouts give the same numbers" in out.err


@pytest.mark.parametrize(("verb", "wrong", "layout", "named"), [
    # a sum over tensor shards that averages instead: the forward pass is already wrong
    ("leave", lambda x, sequence: lax.pmean(x, "tensor"), "tensor 2", "gradient of "),
    # tokens that go to the wrong experts and come back
    ("exchange", misdirected, "expert 4", "gradient of "),
    # the figures and gradients of one shard taken for those of all
    ("total", lambda tree, axes: collectives.mean(tree), "data 8", "gradient of "),
])
def test_a_wrong_collective_is_found(text, monkeypatch, capsys, verb, wrong, layout, named):
    only(monkeypatch, layout)
    monkeypatch.setattr(collectives, verb, wrong)
    assert cli.main(["verify", "configs/tiny.py", "--steps", "1", *text]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"verify: {layout}: {named}")


def test_needs_a_step(text, capsys):
    assert cli.main(["verify", "configs/tiny.py", "--steps", "0", *text]) == 2
    assert "--steps must be 1 or more; got 0" in capsys.readouterr().err

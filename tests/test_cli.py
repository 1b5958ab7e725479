"""The command line in this process: exit status, what is on stdout and stderr, and what lies in the run folder."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax.cli import main
from moejax.train import loop

CONFIG = """
from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train

def config():
    return Config(
        model=Model(layers=1, d_model=8, heads=2, head_dim=4, moe=MoE(experts=2, active=1, hidden=8, group=4)),
        mesh=Mesh(fake_devices=1), data=Data(sources=("{folder}/text",), sequence=16, batch=4, validation=0.5,
        cache="{folder}/cache"), optimizer=Optimizer(warmup=0), train=Train(steps=2, eval_batches=1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for n in range(4):
        (folder / "text" / f"{n}.txt").write_text(f"{n} is a number. " * 20)
    (folder / "mine.py").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> tuple[str, str, str]:
    """The run folder of `moejax train --json`, and what it printed on stdout and stderr."""
    run, out, err = str(folder / "run"), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["train", str(folder / "mine.py"), "--json", f"run_dir={run}"]) == 0
    return run, out.getvalue(), err.getvalue()


def refused(capfd, *arguments: str) -> str:
    """What a command that exits with 2 says on stderr, and nothing on stdout."""
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    return err


def test_every_problem_is_listed(folder, capfd):
    err = refused(capfd, "train", str(folder / "mine.py"), "train.stepz=3", "mesh.data=0", "optimizer.lr=fast")
    assert err == ("moejax train: 3 problems\n"
                   "  - unknown field 'train.stepz'; did you mean train.steps?\n"
                   "  - optimizer.lr takes a number; got 'fast'\n"
                   "  - mesh.data must be above 0; got 0; set it to 1 or more\n")
    err = refused(capfd, "verify", str(folder / "nine.py"), "--json")
    assert err == (f"moejax verify: 1 problem\n  - a config is a Python file; {folder}/nine.py does not exist; "
                   f"did you mean {folder}/mine.py?\n")


def test_train_prints_one_json_object(trained):
    run, out, err = trained
    assert out.endswith("}\n") and out.count("\n") == 1
    record = json.loads(out)
    assert record["run_dir"] == run and record["step"] == 2 and record["loss"] > 0 and record["validation_loss"] > 0
    assert json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1]) | {"run_dir": run} == record
    assert "step 2/2" in err and "parameters" in err


def test_train_without_json_keeps_stdout_free(trained, folder, capfd):
    assert main(["train", str(folder / "mine.py"), f"run_dir={trained[0]}"]) == 0
    out, err = capfd.readouterr()
    assert out == "" and "has done 2 of 2 steps already" in err


def test_a_run_folder_of_another_config(trained, folder, capfd):
    before = (Path(trained[0]) / "config.json").read_text()
    err = refused(capfd, "train", str(folder / "mine.py"), f"run_dir={trained[0]}", "optimizer.lr=1", "--json")
    assert "was begun with another config (optimizer.lr is 0.0003 there and 1.0 here); set run_dir" in err
    assert (Path(trained[0]) / "config.json").read_text() == before


def test_a_run_that_fails_exits_with_1(folder, capfd, monkeypatch):
    def diverge(config):
        raise loop.RunFailed("loss and gradient norm must be finite")

    monkeypatch.setattr(loop, "train", diverge)
    assert main(["train", str(folder / "mine.py"), "--json"]) == 1
    assert capfd.readouterr() == ("", "moejax train: loss and gradient norm must be finite\n")


def test_a_run_that_is_stopped_is_no_failure(folder, capfd, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda config: {"step": 3, "stopped": "SIGTERM"})
    assert main(["train", str(folder / "mine.py"), "--json", "run_dir=a"]) == 0
    assert json.loads(capfd.readouterr().out) == {"run_dir": "a", "step": 3, "stopped": "SIGTERM"}


def test_the_processes_of_a_group_are_options_too(folder, capfd, monkeypatch, tmp_path):
    given = {"MOEJAX_COORDINATOR": "host:1234", "MOEJAX_PROCESSES": "2", "MOEJAX_PROCESS": "0"}
    for name in given:
        monkeypatch.setenv(name, "")  # and it is so again after the test
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda config: {name: os.environ[name] for name in given})
        command = ["train", str(folder / "mine.py"), "--json", "run_dir=a"]
        assert main([*command, "--coordinator", "host:1234", "--processes", "2", "--process", "0"]) == 0
        assert json.loads(capfd.readouterr().out) == {"run_dir": "a"} | given
        assert main([*command, "--process", "1"]) == 0  # the rest as the environment has it
        assert json.loads(capfd.readouterr().out)["MOEJAX_PROCESS"] == "1" and os.environ["MOEJAX_PROCESSES"] == "2"
    monkeypatch.setenv("MOEJAX_COORDINATOR", "")
    err = refused(capfd, "train", str(folder / "mine.py"), f"run_dir={tmp_path / 'run'}", "--process", "2")
    assert err.startswith("moejax train: 2 problems\n  - a group of processes needs MOEJAX_COORDINATOR, ")
    assert "MOEJAX_PROCESS must lie below MOEJAX_PROCESSES; got 2 and 2; " in err


def test_an_error_that_is_not_ours_is_not_hidden(folder, monkeypatch):
    def fail(config):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["train", str(folder / "mine.py")])


@pytest.mark.parametrize("passed, status", [(True, 0), (False, 1)])
def test_verify_exits_with_its_verdict(folder, capfd, monkeypatch, passed, status):
    from moejax.train import verify

    monkeypatch.setattr(verify, "verify", lambda config, steps: {"passed": passed, "steps": steps, "name": config.name})
    assert main(["verify", str(folder / "mine.py"), "--steps", "5", "--json", "name=b"]) == status
    assert json.loads(capfd.readouterr().out) == {"passed": passed, "steps": 5, "name": "b"}


@pytest.fixture(scope="module")
def texts(trained) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of `moejax generate`: greedy, and with --json one token beyond the training."""
    done = []
    for more in (["--temperature", "0"], ["--max-new-tokens", "13", "--json", "--seed", "3", "name=b"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main(["generate", trained[0], "2 is", *more])
        done.append((status, out.getvalue(), err.getvalue()))
    return done


def test_generate_prints_and_keeps_the_text(trained, texts):
    (status, plain, quiet), (other, sampled, note) = texts
    assert status == other == 0
    assert plain.startswith("2 is") and plain.endswith("\n")
    assert sampled.count("\n") == 1 and json.loads(sampled)["prompt"] == "2 is"
    kept = [json.loads(line) for line in (Path(trained[0]) / "samples.jsonl").read_text().splitlines()]
    assert kept == [{"prompt": "2 is", "text": plain[4:-1]}, json.loads(sampled)]
    # 4 bytes of prompt and 12 more are a training sequence of 16
    assert quiet == "" and "17 tokens are more than the 16 of data.sequence in training" in note


def test_generate_refuses_and_keeps_nothing(trained, texts, capfd, tmp_path):
    samples = Path(trained[0]) / "samples.jsonl"
    before = samples.read_text()
    err = refused(capfd, "generate", trained[0], "", "--max-new-tokens", "0", "--temperature", "-1", "--top-p", "2")
    assert err.splitlines() == [
        "moejax generate: 4 problems", "  - a prompt has at least one token; got an empty one",
        "  - max_new_tokens must be 1 or more; got 0",
        "  - temperature must not be negative; got -1.0; 0 takes the likeliest token",
        "  - top_p must be above 0 and at most 1; got 2.0"]
    err = refused(capfd, "generate", trained[0], "a", "--chat")
    assert err.startswith("moejax generate: 1 problem\n  - a chat needs a template; data.tokenizer=bytes has none; ")
    assert samples.read_text() == before
    err = refused(capfd, "generate", str(tmp_path), "a")
    assert err == ("moejax generate: 1 problem\n"
                   f"  - a run folder holds a config.json; {tmp_path} has none; train it first\n")
    err = refused(capfd, "generate", trained[0], "a", "mesh.tensor=0", "--seed", "1", "modell.layers=2")
    assert err.splitlines() == [
        "moejax generate: 2 problems", "  - unknown field 'modell.layers'; did you mean model.layers?",
        "  - mesh.tensor must be above 0; got 0; set it to 1 or more"]


def test_report_writes_a_page(trained, capfd, tmp_path):
    path = Path(trained[0]) / "report.html"
    assert main(["report", trained[0]]) == 0
    assert capfd.readouterr().out == f"{path}\n"
    assert path.read_text().startswith("<!doctype html>")
    assert main(["report", trained[0], "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"report": str(path)}
    missing = str(tmp_path / "missing")
    assert f"a report is of a run folder; {missing} does not exist" in refused(capfd, "report", missing)


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: COMMAND"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
    (["train"], "the following arguments are required: CONFIG\n"),
    (["generate", "runs/x"], "the following arguments are required: PROMPT\n"),
    (["train", "mine.py", "--fast"], "unrecognized arguments: --fast"),
    (["train", "mine.py", "--fast", "a=b"], "unrecognized arguments: --fast"),
    (["report", "runs/x", "a=b"], "unrecognized arguments: a=b"),
    (["train", "mine.py", "--processes"], "argument --processes: expected one argument\n"),
    (["checkpoint", "list"], "the following arguments are required: RUN\n"),
    (["checkpoint", "diff", "runs/x", "runs/y", "runs/z"], "unrecognized arguments: runs/z"),
    (["generate", "runs/x", "a", "--seed", "one"], "argument --seed: invalid int value: 'one'")])
def test_usage(arguments, message, capfd):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("usage: moejax") and message in err


def test_help_names_every_command(capfd):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    out = capfd.readouterr().out
    assert all(re.search(rf"\n    {name}\s", out) for name in ("train", "verify", "generate", "report", "checkpoint"))


def test_a_run_in_python(trained, texts):
    """What the command does, by `moejax.load` and `moejax.generate`."""
    model = moejax.load(trained[0])
    assert moejax.generate(model, ["2 is"], max_new_tokens=12) == [texts[0][1][4:-1]]
    options = {"max_new_tokens": 13, "temperature": 0.8, "top_p": 0.95}
    sampled = json.loads(texts[1][1])["text"]
    assert moejax.generate(model, ["2 is"], **options, seed=3) == [sampled]
    assert moejax.generate(model, ["2 is"], **options, seed=4) != [sampled]
    output = model(np.array([[1, 2, 3, 4, 5, 6, 7, 8]]))
    assert output.logits.shape == (1, 8, 264) and output.routing.expert.shape == (1, 1, 8, 1)
    with pytest.raises(moejax.ConfigError) as error:
        model(np.zeros((1, 6), int))
    assert error.value.problems == [
        "the number of tokens must be a multiple of model.moe.group, or below it; got 6 and 4; pad the sequences"]
    many = moejax.load(trained[0], ["mesh.data=4", "mesh.fake_devices=4"])
    with pytest.raises(moejax.ConfigError) as error:
        many(np.zeros((6, 4), int))
    assert error.value.problems == [
        "the number of sequences must be a multiple of the mesh's batch shards; got 6 and 4; pad them, or "
        "load with mesh.data=1"]


def test_plan_draws_the_schedule(tmp_path, capfd):
    path = tmp_path / "piped.py"
    path.write_text("from moejax.config import *\ndef config():\n"
                    "    return Config(mesh=Mesh(pipeline=4), train=Train(microbatches=8))\n")
    assert main(["plan", str(path), "--schedule"]) == 0
    out = capfd.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[:4]] == [["stage", str(s)] for s in range(4)]
    assert "1f1b: 4 stages, 8 microbatches, 14 ticks; bubble 27.3%" in out
    assert main(["plan", str(path), "--schedule", "--json", "mesh.schedule=zero_bubble"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["schedule"] == "zero_bubble" and found["bubble"] == pytest.approx(1 / 9)


def test_a_bad_table_is_named_by_tick_and_stage(tmp_path, capfd):
    (tmp_path / "table.csv").write_text("stage 0,stage 1\nF0,\n,F0\nB0,B0\n")
    path = tmp_path / "piped.py"
    path.write_text("from moejax.config import *\ndef config():\n    return Config(mesh=Mesh(pipeline=2, "
                    f"schedule={str(tmp_path / 'table.csv')!r}))\n")
    for command in (["plan", str(path), "--schedule"], ["train", str(path), f"run_dir={tmp_path / 'run'}"]):
        assert main(command) == 2
        assert "tick 2, stage 0: B0 uses B0 of part 1 (stage 1) before it is there" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()

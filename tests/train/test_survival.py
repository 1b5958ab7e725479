"""A run that is killed, stopped, or finds its disk full or its checkpoints damaged ends as the run that was not."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import config as configs
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train import archive, state as states
from moejax.train.checkpoint import Checkpoints, flat, folder_of
from moejax.train.metrics import read_metrics
from moejax.train.optimizer import make_optimizer

TIMES = {"tokens_per_s", "mfu", "step_s", "wall_s", "goodput", "input_share"}
STEPS, EVERY = 60, 3
KINDS = ("flip", "truncate", "zero", "remove")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the text and the compiled programs of all runs."""
    home = tmp_path_factory.mktemp("home")
    (home / "text").mkdir()
    for n in range(8):
        (home / "text" / f"{n}.txt").write_text(" ".join(f"{(7 * n + i * i) % 100} apples" for i in range(200)))
    return home


def begin(home: Path, run: str, *more: str, processes: int = 1) -> subprocess.Popen:
    """`moejax train` in a process of its own, or launch/local.py with several, as a user would."""
    words = ["model.d_model=16", "model.heads=2", "model.head_dim=8", "model.moe.hidden=16", "model.moe.router=sigmoid",
             "data.sequence=16", "data.validation=0.3", f"data.sources={home / 'text'}", f"data.cache={home / 'cache'}",
             f"train.steps={STEPS}", "train.eval_every=20", f"checkpoint.every={EVERY}", f"run_dir={home / run}"]
    start = ["-m", "moejax.cli", "train"] if processes == 1 else ["launch/local.py", "-n", str(processes)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(home / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([sys.executable, *start, "configs/tiny.py", *words, *more], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen, status: int = 0) -> str:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == status, output
    return output


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < step:
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]


def numbers(run_dir: Path) -> list[dict]:
    """The records without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """The run folder of the run that nothing disturbs; its programs are compiled now."""
    end(begin(home, "whole"))
    return home / "whole"


@pytest.fixture(scope="module")
def seconds(home, whole) -> float:
    """How long such a run takes."""
    began = time.monotonic()
    end(begin(home, "timed"))
    return time.monotonic() - began


def assert_same_end(run_dir: Path, whole: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert numbers(run_dir) == numbers(whole)
    assert archive.diff(str(run_dir), str(whole))["differ"] == {}


@pytest.mark.parametrize("kills, seed", [(8, 0), pytest.param(50, 1, marks=pytest.mark.slow)])
def test_killed_at_any_moment(home, whole, seconds, kills, seed):
    """Mostly after the start, where steps, saves and commits follow one another within milliseconds."""
    draw, left, run = random.Random(seed), kills, f"killed{kills}"
    while left:
        process = begin(home, run)
        time.sleep(draw.uniform(0.4, 1.0) * seconds if draw.random() < 0.8 else draw.uniform(0, seconds))
        if process.poll() is None:
            process.kill()
            left -= 1
        process.communicate()
        if process.returncode == 0:  # it came to its end: the next ones begin anew
            assert_same_end(home / run, whole)
            shutil.rmtree(home / run)
    end(begin(home, run))
    assert_same_end(home / run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint(home, whole, number):
    run = home / number.name
    process = begin(home, run.name)
    wait_for_step(process, run, 5)
    began = time.monotonic()
    process.send_signal(number)
    output = end(process)
    assert time.monotonic() - began < 30
    last = read_metrics(run)[-1]["step"]
    assert 5 <= last < STEPS and f"stopped by {number.name} after step {last}" in output
    assert max(row["step"] for row in archive.contents(str(run))) == last
    assert f"resumed after step {last}" in end(begin(home, run.name))
    assert_same_end(run, whole)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_of_several_processes_dies(home, processes):
    """The others end, all are started again, and nothing shows it afterwards but the clock."""
    mesh = [f"mesh.data={processes}", f"mesh.fake_devices={processes}", "train.fault.heartbeat=10"]
    end(begin(home, f"calm{processes}", *mesh, processes=processes))
    run = home / f"lost{processes}"
    process = begin(home, run.name, *mesh, processes=processes)
    wait_for_step(process, run, 10)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    assert "was killed by SIGKILL" in (output := end(process)) and "resumed after step" in output, output
    assert_same_end(run, home / f"calm{processes}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_does_not_end_a_run(home, whole, small_disk):
    """It fills up after some steps, with nothing left for checkpoints and records, and is freed later."""
    run = small_disk / "run"
    process = begin(home, run.name, f"run_dir={run}", "checkpoint.every=1")
    wait_for_step(process, run, 5)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    time.sleep(0.5)
    filler.unlink()
    output = end(process)
    assert "could not be saved" in output and "trying again" in output, output
    assert_same_end(run, whole)


def damage(step: Path, draw: random.Random) -> tuple[str, str]:
    """Harm one file of a checkpoint, in every second case the one with the arrays: the kind of harm, and its place."""
    files = sorted((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file = draw.choice([draw.choice(files), files[-1]])
    data = bytearray(file.read_bytes())
    kind = draw.choice(KINDS)
    if kind == "remove" or not data:
        file.unlink()
        return kind, f"{file} removed"
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[at:]
    else:
        data[at:at + 512] = bytes(len(data[at:at + 512]))
    file.write_bytes(data)
    return kind, f"{file}: {kind} at {at}"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("count, seed", [(40, 0), pytest.param(200, 1, marks=pytest.mark.slow)])
def test_damage_is_noticed_or_harmless(home, whole, tmp_path, count, seed):
    config = configs.from_json((whole / "config.json").read_text())
    sharded = Sharded(config, make_mesh(configs.Mesh(), jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, STEPS, states.trained(sharded, sharded.axes))
    layout = states.abstract(sharded, optimizer)

    def restored(run: Path, said: list[str]) -> tuple[int, dict[str, np.ndarray]]:
        place = configs.put(config, ["run_dir"], str(run))
        checkpoints = Checkpoints(place, said.append)
        state, position = checkpoints.restore(layout)
        checkpoints.close()
        assert int(state.step) == position.step
        return position.step, jax.device_get(flat(state))

    newest, older = STEPS, STEPS - EVERY
    good = {}
    for step in (newest, older):
        shutil.copytree(whole, tmp_path / str(step))
        if step == older:
            shutil.rmtree(tmp_path / str(step) / "checkpoints" / str(newest))
        found, good[step] = restored(tmp_path / str(step), [])
        assert found == step
    draw, noticed = random.Random(seed), set()
    for i in range(count):
        run = tmp_path / f"damaged{i}"
        shutil.copytree(whole, run)
        kind, what = damage(Path(folder_of(config.checkpoint, run)) / str(newest), draw)
        said: list[str] = []
        step, arrays = restored(run, said)
        for name, value in good[step].items():
            assert arrays[name].tobytes() == value.tobytes(), (what, name)
        if step == older:
            noticed.add(kind)
            assert "is damaged" in said[0] and "aside" in said[-1], what
        shutil.rmtree(run)
    gc.collect()  # here, where what Orbax has left open is no error
    assert noticed == set(KINDS)  # how much of a checkpoint is needed, and where it lies, Orbax decides anew each time

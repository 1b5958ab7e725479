"""The local launcher, with a stand-in for moejax that follows the script a test gives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"
# What a script can use: `me`, `count`, and as `start` how often this process was started.
HEAD = """
import os, pathlib, signal, sys, time
me, count = int(os.environ["MOEJAX_PROCESS"]), int(os.environ["MOEJAX_PROCESSES"])
with open(f"started{me}", "a+") as file:
    file.write(os.environ["MOEJAX_COORDINATOR"] + "\\n")
    file.seek(0)
    start = len(file.readlines())
def stop(number, frame):
    print("stops at", signal.Signals(number).name, flush=True)
    sys.exit(0)
"""
WAITS = "signal.signal(signal.SIGTERM, stop); print('waits', flush=True); time.sleep(20)"


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher with options in a folder of its own; what still runs at the end of the test is killed."""
    (tmp_path / "moejax").mkdir()
    started = []

    def launch(script: str, *options: str) -> subprocess.Popen:
        (tmp_path / "moejax" / "cli.py").write_text(HEAD + script)
        started.append(subprocess.Popen([sys.executable, LAUNCHER, *options, "mine.py", "train.steps=3"], cwd=tmp_path,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def starts(folder: Path, process: int = 0) -> list[str]:
    """The coordinator at each start of a process."""
    file = folder / f"started{process}"
    return file.read_text().split() if file.exists() else []


def until(happened: Callable[[], bool]) -> None:
    for _ in range(200):
        if happened():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


def test_every_process_gets_the_command_line_and_its_place_in_the_group(launch, tmp_path):
    process = launch("print(sys.argv[1:], me, count)\nprint('to stderr', file=sys.stderr)", "-n", "3")
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    words = "['train', 'mine.py', 'train.steps=3']"
    assert out == f"{words} 0 3\n"
    assert sorted(err.splitlines()) == [f"[1] {words} 1 3", "[1] to stderr", f"[2] {words} 2 3", "[2] to stderr",
                                        "to stderr"]
    [coordinator] = starts(tmp_path)
    assert starts(tmp_path, 1) == starts(tmp_path, 2) == [coordinator]
    host, port = coordinator.split(":")
    assert host == "127.0.0.1" and int(port) > 1023


def test_an_end_of_one_process_alone_is_waited_out(launch, tmp_path):
    process = launch("time.sleep(0 if me else 0.6)\nprint('last', me)", "-n", "2", "--grace", "0.1")
    assert process.communicate(timeout=20) == ("last 0\n", "[1] last 1\n")
    assert process.returncode == 0


def test_all_start_again_after_one_failed(launch, tmp_path):
    process = launch("sys.exit(3 if me and start == 1 else 0)", "-n", "2")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert err.splitlines() == ["local.py: process 1 ended with status 3", "local.py: starting all again (1 of 3)"]
    first, second = starts(tmp_path)
    assert starts(tmp_path, 1) == [first, second] and first != second  # a port still held would fail the restart too


def test_restarts_are_counted(launch, tmp_path):
    process = launch("os.kill(os.getpid(), signal.SIGABRT) if me == 0 else None", "-n", "2", "--restarts", "2")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert len(starts(tmp_path)) == len(starts(tmp_path, 1)) == 3
    died = "local.py: process 0 was killed by SIGABRT"
    assert err.splitlines() == [died, "local.py: starting all again (1 of 2)",
                                died, "local.py: starting all again (2 of 2)", died, "local.py: no restarts left"]


def test_a_mistake_is_not_tried_again_and_stops_the_others(launch, tmp_path):
    process = launch("ready = pathlib.Path('ready')\n"
                     "if me == 0: signal.signal(signal.SIGTERM, stop); ready.touch(); time.sleep(20)\n"
                     "while not ready.exists(): time.sleep(0.01)\nsys.exit(2)", "-n", "2")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "stops at SIGTERM\n")
    assert err == "local.py: process 1 ended with status 2\n"
    assert len(starts(tmp_path)) == 1


def test_those_that_survive_a_failure_are_killed_after_the_grace_time(launch, tmp_path):
    process = launch(f"if me: sys.exit(1)\n{WAITS}", "-n", "2", "--grace", "0.5", "--restarts", "0")
    begin = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and 0.5 < time.monotonic() - begin < 10
    assert err.splitlines() == ["local.py: process 1 ended with status 1", "local.py: process 0 still ran after 0.5 s",
                                "local.py: process 0 was killed by SIGKILL", "local.py: no restarts left"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_reaches_all_and_is_the_end(launch, tmp_path, number):
    process = launch(f"for each in (signal.SIGINT, signal.SIGUSR1): signal.signal(each, stop)\n{WAITS}", "-n", "2")
    assert process.stdout.readline() == "waits\n" and process.stderr.readline() == "[1] waits\n"
    process.send_signal(number)
    assert process.communicate(timeout=20) == (f"stops at {number.name}\n", f"[1] stops at {number.name}\n")
    assert process.returncode == 0
    assert len(starts(tmp_path)) == 1


def test_what_does_not_stop_is_killed_and_not_started_again(launch, tmp_path):
    process = launch("signal.signal(signal.SIGTERM, lambda *_: print('hears'))\nprint('waits')\n"
                     "end = time.time() + 20\nwhile time.time() < end: time.sleep(1)", "-n", "1", "--grace", "0.5")
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "hears\n")
    assert err.splitlines() == ["local.py: process 0 still ran after 0.5 s",
                                "local.py: process 0 was killed by SIGKILL"]
    assert len(starts(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_no_process_outlives_a_killed_launcher(launch, tmp_path):
    process = launch("pathlib.Path(f'pid{me}').write_text(f'{os.getpid()} ')\ntime.sleep(20)", "-n", "2")
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    until(lambda: all(file.exists() and file.read_text().endswith(" ") for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(running(pid) for pid in pids)
    process.kill()
    until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    """A zombie that nobody has waited for runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("words", [["-n", "2"], ["-n", "0", "mine.py"], ["mine.py"],
                                   ["-n", "2", "--restarts", "-1", "mine.py"]])
def test_wrong_use(words):
    done = subprocess.run([sys.executable, LAUNCHER, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: local.py") and not done.stdout


def test_moejax_itself_is_what_it_starts(tmp_path):
    done = subprocess.run([sys.executable, LAUNCHER, "-n", "1", "nowhere.py"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["moejax train: 1 problem",
                                        "  - a config is a Python file; nowhere.py does not exist",
                                        "local.py: process 0 ended with status 2"]

"""What the user sees of a run: plain lines away from a terminal, a bar on one, and an honest remaining time."""

import io
import re

import pytest
from rich.console import Console

from moejax.train.progress import Progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def record(step, **more):
    return {"step": step, "loss": 2.5, "tokens_per_s": 12345.6, **more}


def lines(console):
    return console.file.getvalue().splitlines()


@pytest.fixture
def pipe():
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})


def test_plain_lines_come_every_log_every_steps_and_first_and_last(pipe):
    with Progress(7, 0, log_every=3, console=pipe) as progress:
        for step in range(1, 8):
            progress.update(record(step))
    assert [line.split()[1] for line in lines(pipe)] == ["1/7", "3/7", "6/7", "7/7"]
    assert "\x1b" not in pipe.file.getvalue()


def test_a_plain_line_holds_the_figures(pipe):
    clock = Clock()
    with Progress(100, 0, log_every=10, console=pipe, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 500 if step == 1 else 2  # the first step compiles
            progress.update(record(step, validation_loss=2.75) if step == 4 else record(step))
    assert lines(pipe) == [  # 96 and 90 steps of 2 s are left; the 500 s do not count
        "step 1/100  loss 2.5000  12,346 tokens/s",
        "step 4/100  loss 2.5000  validation 2.7500  12,346 tokens/s  0:03:12 left",
        "step 10/100  loss 2.5000  validation 2.7500  12,346 tokens/s  0:03:00 left"]


def test_remaining_time_follows_the_latest_steps_and_a_resume(pipe):
    clock = Clock()
    with Progress(1000, 500, log_every=10_000, console=pipe, clock=clock) as progress:
        for step in range(501, 901):
            clock.now += 1 if step <= 750 else 5
            progress.update(record(step))
    assert progress.bar.tasks[0].time_remaining == 100 * 5  # the 100 steps to go take 5 s each now, not 2.5
    assert [line.split()[1] for line in lines(pipe)] == ["501/1000"]


def test_remaining_time_after_going_back(pipe):
    """What was done twice does not count as slow."""
    clock = Clock()
    with Progress(100, 0, log_every=10_000, console=pipe, clock=clock) as progress:
        for step in [*range(1, 51), *range(31, 41)]:
            clock.now += 2
            progress.update(record(step))
            assert progress.bar.tasks[0].time_remaining == (None if clock.now in (2, 102) else 2 * (100 - step))


def test_the_other_processes_of_a_group_show_nothing(monkeypatch, capsys):
    for terminal in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        with Progress(2, 0, shown=False) as progress:
            assert progress.plain == (terminal == "")
            progress.update(record(1))
            progress.say("one line")
            progress.update(record(2))
    assert capsys.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_is_shown(pipe):
    with Progress(2, 0, console=pipe) as progress:
        progress.update(record(1, loss=float("nan")))
        progress.update(record(2, loss=float("inf"), validation_loss=float("nan")))
    assert [re.findall(r"(?:loss|validation) (?:nan|inf)", line) for line in lines(pipe)] == [
        ["loss nan"], ["loss inf", "validation nan"]]


def test_a_terminal_gets_a_bar_with_the_same_figures(terminal):
    clock = Clock()
    with Progress(40, 10, console=terminal, clock=clock) as progress:
        progress.update(record(11))
        clock.now = 3
        progress.update(record(12, validation_loss=2.75))
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())
    # 28 steps of 3 s are left
    assert re.search(r"step 12/40 ━.* loss 2\.5000  validation 2\.7500  12,346 tokens/s  0:01:24 left", drawn)
    assert "\x1b" in terminal.file.getvalue()


def test_the_terminal_says_that_it_compiles(terminal):
    with Progress(40, 10, console=terminal):
        pass
    assert "step 10/40" in terminal.file.getvalue() and "compiling" in terminal.file.getvalue()


def test_say_prints_above_the_bar_and_as_it_is(terminal, pipe):
    for console in (terminal, pipe):
        with Progress(40, 0, console=console) as progress:
            progress.update(record(1))
            progress.say("checkpoint [red]1[/red] saved")
            progress.update(record(2))
        text = console.file.getvalue()
        assert text.count("checkpoint [red]1[/red] saved") == 1
    assert text.index("step 1/40") < text.index("saved")
    after = terminal.file.getvalue().split("saved")[1]
    assert "step 2/40" in after


def test_the_default_is_stderr(capsys):
    with Progress(1, 0) as progress:
        progress.update(record(1))
    assert capsys.readouterr() == ("", "step 1/1  loss 2.5000  12,346 tokens/s\n")

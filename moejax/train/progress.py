"""What a person sees of a run while it trains: a bar on a terminal, plain lines anywhere else.

The training loop drives it with the records that it also logs.  It draws on stderr, so that stdout stays
free for results (`--json`).
"""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn

WINDOW = 100  # steps over which the remaining time is estimated


class Progress:
    """Shows the steps from `start`, that of a resumed run, to the last; use as a context manager.  Plain lines are
    `log_every` steps apart; not `shown`, as in the processes of a group beside the first, it draws nothing.
    """

    def __init__(self, steps: int, start: int = 0, log_every: int = 10, console: Console | None = None,
                 clock: Callable[[], float] = time.monotonic, shown: bool = True):
        self.steps, self.start, self.log_every, self.clock = steps, start, log_every, clock
        self.console = console or Console(stderr=True, quiet=not shown)
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self.validation: float | None = None
        self.seen: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)  # (step, time at its end)
        self.bar = rich.progress.Progress(
            SpinnerColumn(), TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self.console, expand=True, refresh_per_second=4, redirect_stdout=False)
        self.task = self.bar.add_task("", total=steps, completed=start, figures="compiling the first step")

    def __enter__(self) -> "Progress":
        if not self.plain:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.plain:
            self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Shows the record of a step that has ended."""
        step = record["step"]
        if self.seen and step <= self.seen[-1][0]:  # the run has gone back
            self.seen.clear()
        self.seen.append((step, self.clock()))
        if evaluated := "validation_loss" in record:
            self.validation = number(record["validation_loss"])
        text = self.figures(record)
        self.bar.update(self.task, completed=step, figures=text)
        if self.plain and (evaluated or step % self.log_every == 0 or step in (self.start + 1, self.steps)):
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def figures(self, record: dict[str, Any]) -> str:
        parts = [f"loss {number(record.get('loss')):.4f}"]
        if self.validation is not None:
            parts.append(f"validation {self.validation:.4f}")
        parts.append(f"{number(record.get('tokens_per_s')):,.0f} tokens/s")
        if (left := self.remaining()) is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        return "  ".join(parts)

    def remaining(self) -> float | None:
        """Seconds to go, from the wall time of the latest steps; None until two have ended.  The first step, which
        compiles, is left out; evaluations and checkpoints between steps are not.
        """
        (first, began), (last, now) = self.seen[0], self.seen[-1]
        return (self.steps - last) * (now - began) / (last - first) if last > first else None


def number(value: float | None) -> float:
    return float("nan") if value is None else float(value)

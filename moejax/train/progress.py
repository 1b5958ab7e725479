"""What a person sees of a run while it trains, on stderr: a bar on a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn

WINDOW = 600  # seconds over which the remaining time is estimated


class Progress:
    """Shows steps, from `start` on; plain lines are `log_every` steps apart.  Draws nothing where it is not `shown`."""

    def __init__(self, steps: int, start: int = 0, log_every: int = 10, console: Console | None = None,
                 clock: Callable[[], float] = time.monotonic, shown: bool = True):
        self.steps, self.start, self.log_every = steps, start, log_every
        self.console = console or Console(stderr=True, quiet=not shown)
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self.validation = ""
        self.bar = rich.progress.Progress(
            SpinnerColumn(), TextColumn("step {task.completed}/{task.total}"), BarColumn(None),
            TextColumn("{task.fields[figures]}", markup=False), console=self.console, expand=True, get_time=clock,
            refresh_per_second=4, redirect_stdout=False, speed_estimate_period=WINDOW, disable=self.plain)
        self.task = self.bar.add_task("", total=steps, completed=start, figures="compiling the first step")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Shows the record of a step that has ended."""
        step = record["step"]
        if evaluated := "validation_loss" in record:
            self.validation = f"validation {record['validation_loss']:.4f}  "
        if step <= self.bar.tasks[0].completed:  # the run has gone back
            self.bar.reset(self.task, completed=step - 1)
        self.bar.update(self.task, completed=step)
        figures = f"loss {record['loss']:.4f}  {self.validation}{record['tokens_per_s']:,.0f} tokens/s"
        if left := self.bar.tasks[0].time_remaining:  # by the latest steps but the first, which compiles
            figures += f"  {timedelta(seconds=left)} left"
        self.bar.update(self.task, figures=figures)
        if self.plain and (evaluated or step % self.log_every == 0 or step in (self.start + 1, self.steps)):
            self.say(f"step {step}/{self.steps}  {figures}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

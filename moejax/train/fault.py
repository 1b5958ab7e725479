"""What goes wrong while a run goes on: steps that must not count, signals to stop, and processes that hang."""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import multihost_utils

from moejax import config as configs
from moejax.parallel import processes

WARMUP = 20  # good steps before their means can tell a spike
MEMORY = 0.98  # of the running means


class RunFailed(RuntimeError):
    """A run cannot go on."""


class Health(NamedTuple):
    """Of a run up to now; saved with it, so that a resumed run judges as the undisturbed one."""

    loss: Array  # running means over the good steps
    norm: Array
    good: Array  # steps, int32
    bad: Array  # in a row
    skipped: Array  # in all

    @classmethod
    def fresh(cls) -> "Health":
        return cls(jnp.zeros(()), jnp.zeros(()), *[jnp.zeros((), jnp.int32)] * 3)


def judge(health: Health, loss: Array, norm: Array, rules: configs.Fault) -> tuple[Array, Health]:
    """Whether a step is bad (not finite, or far above the running means), and the health after it."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    both = (loss, health.loss, rules.loss_spike), (norm, health.norm, rules.norm_spike)
    for value, mean, factor in both:
        if factor is not None:
            bad |= (health.good >= WARMUP) & (value > factor * mean)
    rate = jnp.maximum(1 / (health.good + 1), 1 - MEMORY)  # the plain mean at first
    means = (jnp.where(bad, mean, mean + rate * (value - mean)) for value, mean, _ in both)
    step = bad.astype(jnp.int32)
    return bad, Health(*means, health.good + 1 - step, (health.bad + 1) * step, health.skipped + step)


class Stop:
    """Hears SIGTERM and SIGINT; a second one ends the run at once.  JAX has all processes end after the same step."""

    def __enter__(self) -> "Stop":
        self.heard: str | None = None
        # JAX itself listens to SIGTERM in a group of processes.
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        main = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self.hear) for number in numbers if main}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def hear(self, number: int, _: FrameType | None) -> None:
        self.heard = signal.Signals(number).name
        self.__exit__()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> str | None:
        """The signal after which the run ends with this step, if any.  All processes must ask, for every step."""
        if jax.process_count() == 1:
            return self.heard
        return (self.heard or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else None


class Watchdog:
    """Says what this process has been doing for longer than `seconds`, and where in the code it is."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.at("starting")

    def at(self, doing: str) -> None:
        self.doing, self.since, self.patience = doing, time.monotonic(), self.seconds

    def watch(self) -> None:
        while not self.done.wait(min(self.seconds / 4, 10)):
            taken = time.monotonic() - self.since
            if taken > self.patience:
                self.patience = 2 * taken
                print(f"host {jax.process_index()} of {jax.process_count()} has been {self.doing} for {taken:.0f} s",
                      file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


def tell(text: str) -> None:
    """A line on stderr, from the first process of a group."""
    if processes.first():
        print(text, file=sys.stderr, flush=True)

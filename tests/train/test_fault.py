"""Steps that must not count, signals to stop, and the watchdog."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import Config, Data, Fault, Model, MoE, Optimizer, Train
from moejax.model.sharded import Sharded
from moejax.parallel import processes
from moejax.parallel.mesh import make_mesh
from moejax.train import fault
from moejax.train.fault import WARMUP, Health, Stop, Watchdog, judge, tell
from moejax.train.optimizer import OPTIMIZERS, make_optimizer
from moejax.train.state import State, fresh, trained
from moejax.train.step import Figures, make_update

NAN, INF, DEFAULT = float("nan"), float("inf"), Fault()


@partial(jax.jit, static_argnames="rules")
def judged(health: Health, loss: float, norm: float, rules: Fault = DEFAULT) -> tuple[jax.Array, Health]:
    return judge(health, jnp.float32(loss), jnp.float32(norm), rules)


def run(*steps: tuple[float, float], rules: Fault = DEFAULT) -> tuple[list[bool], Health]:
    """Which (loss, norm) of a run were bad, and the health at its end."""
    health, bad = Health.fresh(), []
    for loss, norm in steps:
        one, health = judged(health, loss, norm, rules)
        bad.append(bool(one))
    return bad, Health(*map(np.asarray, health))


GOOD = [(2.0, 1.0)] * WARMUP


# Steps


@pytest.mark.parametrize("before", [[], GOOD])
@pytest.mark.parametrize("rules", [Fault(), Fault(loss_spike=None, norm_spike=None)])
@pytest.mark.parametrize("step", [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (2.0, NAN), (2.0, INF), (NAN, NAN)])
def test_what_is_not_finite_is_bad_from_the_first_step(before, rules, step):
    found, health = run(*before, step, (2.0, 1.0), rules=rules)
    assert found == [False] * len(before) + [True, False]
    assert all(np.isfinite(health)) and (health.loss, health.norm) == (2, 1)
    assert (health.good, health.bad, health.skipped) == (len(before) + 1, 0, 1)


@pytest.mark.parametrize("step, bad", [  # means are 2 and 1
    ((4.0, 1.0), False), ((4.001, 1.0), True), ((2.0, 10.0), False), ((2.0, 10.01), True), ((0.0, 0.0), False),
    ((1e30, 1e30), True)])
def test_a_spike_is_bad_when_the_means_are_known(step, bad):
    assert run(*GOOD, step)[0][-1] is bad
    assert run(*GOOD[1:], step)[0][-1] is False
    # bad steps are no part of the twenty
    assert run(*GOOD[1:], *[(NAN, NAN)] * 5, step)[0][-1] is False
    assert run(*GOOD[1:], (NAN, NAN), GOOD[0], step)[0][-1] is bad


@pytest.mark.parametrize("rules, bad", [
    (Fault(), [True, True]), (Fault(loss_spike=None), [False, True]), (Fault(norm_spike=None), [True, False]),
    (Fault(loss_spike=None, norm_spike=None), [False, False]), (Fault(loss_spike=6.0, norm_spike=1.5), [False, True]),
    (Fault(loss_spike=4.0, norm_spike=60.0), [True, False])])
def test_each_rule_has_its_factor_or_is_off(rules, bad):
    # 5 times the mean loss, then 50 times the mean norm
    assert [run(*GOOD, step, rules=rules)[0][-1] for step in ((10.0, 1.0), (2.0, 50.0))] == bad


def test_the_means_are_plain_at_first_and_forget_later():
    random = np.random.default_rng(0)
    losses, norms = random.uniform(2, 3, 120), random.uniform(1, 2, 120)
    bad, health = run(*zip(losses[:50], norms[:50], strict=True))
    assert not any(bad)
    np.testing.assert_allclose(health[:2], [losses[:50].mean(), norms[:50].mean()], rtol=1e-5)
    loss, norm = losses[:50].mean(), norms[:50].mean()
    for i in range(50, 120):  # 0.02 of the new, as of the fiftieth
        loss, norm = 0.98 * loss + 0.02 * losses[i], 0.98 * norm + 0.02 * norms[i]
    bad, health = run(*zip(losses, norms, strict=True))
    assert not any(bad)
    np.testing.assert_allclose(health[:2], [loss, norm], rtol=1e-5)


def test_bad_steps_move_no_means():
    """Neither with what is not finite nor with a spike, so that a spike of many steps does not become the rule."""
    _, before = run(*GOOD)
    bad, health = run(*GOOD, *[(NAN, 1.0), (2.0, INF), (100.0, 1.0), (2.0, 100.0)] * 50)
    assert all(bad[WARMUP:])
    assert (health.loss, health.norm, health.good) == (before.loss, before.norm, before.good) == (2, 1, WARMUP)


def test_counts():
    bad, health = run((NAN, 1), (2, 1), (2, NAN), (INF, 1), (NAN, 1))
    assert bad == [True, False, True, True, True]
    assert (health.good, health.bad, health.skipped) == (1, 3, 4)  # in a row, and in all
    _, health = run((NAN, 1), (2, 1), (2, NAN), (INF, 1), (NAN, 1), (2, 1))
    assert (health.good, health.bad, health.skipped) == (2, 0, 4)
    assert [each.dtype.name for each in health] == ["float32"] * 2 + ["int32"] * 3
    assert jax.tree.map(lambda x: (x.shape, x.dtype), health) == jax.tree.map(
        lambda x: (x.shape, x.dtype), Health.fresh())


# Their updates

CONFIG = Config(
    name="x", run_dir="x", data=Data(sequence=8, batch=4), train=Train(steps=10),
    model=Model(layers=2, d_model=8, heads=2, head_dim=4, moe=MoE(experts=4, hidden=8, router="sigmoid")))


def update_of(name: str):
    """(a state that all numbers of have moved, the update, gradients, figures)"""
    config = replace(CONFIG, optimizer=Optimizer(name=name, lr=0.1, warmup=0))
    sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, 10, trained(sharded, sharded.axes))
    update, random = jax.jit(make_update(sharded, optimizer)), np.random.default_rng(0)
    gradients = {name: jnp.asarray(random.normal(size=sharded.shapes[name]).astype(np.float32))
                 for name, trains in sharded.trainable.items() if trains}
    one = jnp.ones((), jnp.float32)
    figures = Figures(one, one, one, jnp.array([[4.0, 3, 2, 1], [1, 2, 3, 4]]), jnp.zeros(2))
    return fresh(sharded, optimizer), update, gradients, figures


def same(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_of_a_bad_step_is_skipped_to_the_bit(name):
    start, update, gradients, figures = update_of(name)
    state, found = update(start, gradients, figures)
    assert not any(same(old, state.weights[weight]) for weight, old in start.weights.items())
    assert (int(found["bad"]), int(found["skipped"])) == (0, 0)
    first = next(iter(gradients))
    bad = {"loss": (gradients, figures._replace(loss=jnp.float32(NAN))),
           "gradient": (gradients | {first: gradients[first].at[(0,) * gradients[first].ndim].set(NAN)}, figures),
           "all": (jax.tree.map(lambda x: x * NAN, gradients), figures._replace(loss=jnp.float32(INF)))}
    for number, given in enumerate(bad.values(), 1):
        after, found = update(state, *given)
        assert (int(found["bad"]), int(found["skipped"])) == (number, number)
        assert int(after.step) == int(state.step) + 1
        for weight, old in state.weights.items():
            assert same(after.weights[weight], old), weight
        moments, counts = 0, 0
        for new, old in zip(*map(jax.tree.leaves, (after.optimizer, state.optimizer)), strict=True):
            if jnp.issubdtype(old.dtype, jnp.integer):
                counts += 1
                assert int(new) == int(old) + 1
            else:
                moments += 1
                assert same(new, old)
        assert counts > 0 and moments >= len(gradients)
        state = after
    # the next good step moves them, at the rate of its number
    after, found = update(state, gradients, figures)
    assert (int(found["bad"]), int(found["skipped"])) == (0, 3) and int(after.step) == 5
    assert not any(same(old, after.weights[weight]) for weight, old in state.weights.items())
    expected = update(state._replace(health=Health.fresh()), gradients, figures)[1]["lr"]
    assert float(found["lr"]) == float(expected) < float(update(start, gradients, figures)[1]["lr"])


def test_a_spike_is_skipped_by_the_norm_before_clipping():
    start, update, gradients, figures = update_of("adamw")
    state: State = start
    for _ in range(WARMUP):
        state, found = update(state, gradients, figures)
    assert float(found["grad_norm"]) > 10 * 1.0  # of optimizer.clip
    after, found = update(state, jax.tree.map(lambda x: 9 * x, gradients), figures)
    assert int(found["bad"]) == 0 and not same(after.weights["embedding"], state.weights["embedding"])
    after, found = update(state, jax.tree.map(lambda x: 11 * x, gradients), figures)
    assert int(found["bad"]) == 1 and same(after.weights["embedding"], state.weights["embedding"])


# Signals


@pytest.fixture
def handlers():
    """What hears SIGINT and SIGTERM, now; at first as in a process of its own, at the end as it was."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python hears it between two instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_and_the_next_is_not(handlers, number):
    before = handlers()
    with Stop() as stop:
        assert handlers() != before and stop.asked(3) is None
        send(number)
        assert stop.asked(4) == stop.asked(5) == number.name
        assert handlers() == before  # a second one ends the run
    assert handlers() == before


def test_a_second_ctrl_c_is_as_ever(handlers):
    with Stop() as stop:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.heard == "SIGINT"


def test_nothing_heard_leaves_all_as_it_was(handlers):
    before = handlers()
    with pytest.raises(ZeroDivisionError), Stop() as stop:
        raise ZeroDivisionError
    assert handlers() == before and stop.heard is None
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_in_another_thread_signals_are_not_ours(handlers):
    """Python lets only the main thread change who hears them."""
    before, found = handlers(), []

    def run() -> None:
        with Stop() as stop:
            found.append((handlers() == before, stop.asked(1)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(True, None)] and handlers() == before


def test_several_processes_end_after_the_step_that_they_agree_on(handlers, monkeypatch):
    """JAX listens to SIGTERM then, and says when; Ctrl-C is passed on to it."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(fault.multihost_utils, "reached_preemption_sync_point", lambda step: step == 4 and bool(heard))
    with Stop() as stop:
        assert stop.asked(1) is None
        send(signal.SIGINT)
        assert heard == [signal.SIGTERM]
        assert [stop.asked(step) for step in (2, 3, 4)] == [None, None, "SIGINT"]
    with Stop() as stop:
        send(signal.SIGTERM)
        assert stop.heard is None and stop.asked(4) == "SIGTERM"


# The watchdog


class Clock:
    """Time that goes on only while the watchdog waits, up to an end."""

    def __init__(self, end: float):
        self.now, self.end = 1000.0, 1000.0 + end

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self.end


def test_the_watchdog_speaks_once_and_then_after_doubling_times(monkeypatch, capfd):
    clock = Clock(100)
    monkeypatch.setattr(fault, "time", clock)
    watchdog = Watchdog(8.0)
    watchdog.done = clock
    watchdog.at("in step 3")
    watchdog.watch()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("host")]
    # it looks every 2 s: after more than 8, then more than 2 × 10, 2 × 22 and 2 × 46
    assert said == [f"host 0 of 1 has been in step 3 for {seconds} s" for seconds in (10, 22, 46, 94)]


def test_what_goes_on_is_not_spoken_of(monkeypatch, capfd):
    clock, steps = Clock(1000), []
    monkeypatch.setattr(fault, "time", clock)
    watchdog = Watchdog(8.0)

    class Busy(Clock):
        def wait(self, seconds: float) -> bool:
            steps.append(seconds)
            if len(steps) % 4 == 0:  # every 8 s
                watchdog.at(f"in step {len(steps)}")
            clock.now += seconds
            return len(steps) == 400

    watchdog.done = Busy(0)
    watchdog.watch()
    assert set(steps) == {2.0} and capfd.readouterr().err == ""
    assert Watchdog(300.0).patience == 300


def test_it_says_where_in_the_code_a_step_hangs(capfd):
    before = threading.active_count()
    with Watchdog(0.05) as watchdog:
        watchdog.at("in step 7")
        time.sleep(0.3)
    assert threading.active_count() == before
    err = capfd.readouterr().err
    assert 1 <= err.count("host 0 of 1 has been in step 7 for 0 s") <= 3
    assert "in test_it_says_where_in_the_code_a_step_hangs" in err and "test_fault.py" in err


def test_the_first_process_tells(monkeypatch, capfd):
    tell("one")
    monkeypatch.setattr(processes, "first", lambda: False)
    tell("two")
    assert capfd.readouterr() == ("", "one\n")

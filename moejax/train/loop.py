"""A training run from its config to its last checkpoint."""

import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import Config, ConfigError, from_json, to_json
from moejax.data.batch import Batch
from moejax.data.loader import Corpus, document_note, open_corpus, unigram_loss
from moejax.data.samples import make_samples, train_batch, validation_batches
from moejax.data.tokenizer import TOKENIZER_FILE, tokenizer_files
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import mesh as meshes, processes, schedules
from moejax.parallel.schedules import Schedule
from moejax.train import state as states
from moejax.train.begin import beginning
from moejax.train.checkpoint import Checkpoints, Position, differences, first_line
from moejax.train.fault import RunFailed, Stop, Watchdog, tell
from moejax.train.metrics import FILE, MetricsLog, put, read_lines, read_metrics
from moejax.train.optimizer import make_optimizer
from moejax.train.progress import Progress
from moejax.train.state import State
from moejax.train.step import make_evaluation, make_gradients, make_step, validation_loss

UNCLAIMED = ("config.json.tmp", "checkpoints")  # what a run may leave that could not begin
REWINDS = 3  # to the same checkpoint


def train(config: Config) -> dict[str, Any]:
    """Train until config.train.steps or a signal to stop, from the newest good checkpoint of the run if there is one.

    Returns: the last record of metrics.jsonl; with `stopped`, the signal's name, if there was one.
    Raises ConfigError: the run folder holds a run of another config; the text cannot be used; devices are missing;
    every checkpoint is damaged.  RunFailed: bad steps went on after the run had gone back and past their data REWINDS
    times; the last state could not be written; another process of the group has ended.
    """
    began = time.perf_counter()
    if not config.model.layers:
        raise ConfigError(["training needs a model with layers; model.layers is 0, an image encoder alone; begin a "
                           f"model with it by train.init={config.run_dir}"])
    schedule = schedules.make(config)
    run_dir = claim(config)
    meshes.start(config.mesh, config.train.fault.heartbeat)
    with Watchdog(config.train.fault.stall) as watchdog, Stop() as stop, ExitStack() as stack:
        # Build
        for turn in (True, False):  # the first process of a group fills the cache, then the others read it
            if processes.first() is turn:
                corpus = open_corpus(config.data, config.model.vocab)
            processes.barrier("text")
        sharded = Sharded(config, meshes.make_mesh(config.mesh))
        optimizer = make_optimizer(config.optimizer, config.train.steps, states.trained(sharded, sharded.axes))
        step, evaluation = make_step(sharded, optimizer, schedule), make_evaluation(sharded)
        samples = stack.enter_context(closing(make_samples(config, corpus, "train", tell)))
        held_out = None
        if config.data.validation:
            held_out = stack.enter_context(closing(make_samples(config, corpus, "validation", tell)))

        # Restore
        watchdog.at("restoring")
        checkpoints, layout = stack.enter_context(closing(Checkpoints(config))), states.abstract(sharded, optimizer)
        state, position = checkpoints.restore(layout) or (
            states.fresh(sharded, optimizer, beginning(sharded)), Position())
        keep(run_dir, belongings(config, sharded))  # last, as both may be refused
        meter = Meter(config, sharded, read_lines(run_dir / FILE), began)
        processes.barrier("restored")  # the log is cut back from here on

        # Train
        log = stack.enter_context(MetricsLog(run_dir, position.step, write=processes.first()))
        progress = stack.enter_context(
            Progress(config.train.steps, position.step, config.train.log_every, shown=processes.first()))
        record = (read_metrics(run_dir) or [{}])[-1]
        for note in notes(config, corpus, sharded, position.step):
            progress.say(note)
        rewinds, owed, signal, last = 0, False, None, config.train.steps
        while position.step < last and signal is None:
            number = position.step + 1
            watchdog.at(f"reading the batch of step {number}")
            began_reading, at = time.perf_counter(), position.step + position.offset
            batch = on_mesh(sharded.mesh, train_batch(samples, config.data.batch, at))
            for later in (1, 2):  # so that no step waits
                samples.ahead((at + later) * config.data.batch + np.arange(config.data.batch))
            reading = time.perf_counter() - began_reading
            watchdog.at(f"in step {number}")
            if jax.process_count() > 1 and meter.first:  # compile together: who waits too long in a collective gives up
                step = step.lower(state, batch).compile()
                processes.barrier("compiled")
            state, figures = advance(step, state, batch)
            position = position._replace(step=number)
            record = meter.record(number, figures, reading)
            if config.data.images:
                record["images_skipped"] = samples.missing
            if number == 1 and held_out is not None:
                record["unigram_loss"] = unigram_loss(corpus.train, corpus.validation, config.model.vocab)
            if held_out is not None and (number % config.train.eval_every == 0 or number == last):
                watchdog.at(f"in the evaluation after step {number}")
                batches = validation_batches(held_out, config.data.batch, config.train.eval_batches)
                record["validation_loss"] = validation_loss(sharded, evaluation, state.weights, batches)
                meter.restart()
            if trouble := log.write(record):
                tell(f"the record of step {number} could not be written ({trouble}); trying again after the next")
            progress.update(record)

            # Save, or go back
            watchdog.at(f"saving after step {number}")
            signal, owed = stop.asked(number), owed or checkpoints.due(number)
            if record["bad"]:
                tell(f"step {number} is bad, {record['bad']} in a row: loss {record['loss']:.4g}, gradient norm "
                     f"{record['grad_norm']:.4g}; its update is skipped")
            if record["bad"] >= config.train.fault.limit:
                state, back = rewind(checkpoints, layout, position, record, rewinds)
                log.write({"event": "rewind", "step": number, "to": back.step, "offset": back.offset})
                tell(f"back to the checkpoint of step {back.step}, and past the data up to here")
                meter.restart()
                position, rewinds, owed = back, rewinds + 1, False
            elif number == last or signal:
                checkpoints.finish(state, position)
            elif owed and not record["bad"]:
                checkpoints.save(state, position)
                rewinds, owed = 0, False
            checkpoints.check(number)
        if signal:
            progress.say(f"stopped by {signal} after step {position.step}; the same command goes on from there")
            record |= {"stopped": signal}
        elif meter.first:
            progress.say(f"{run_dir} has done {position.step} of {last} steps already; "
                         "set train.steps higher to go on")
        elif sharded.stages:
            progress.say("timing the pipeline with and without its idle ticks")
            keep(run_dir, {"pipeline.json": json.dumps(bubble(sharded, schedule, state.weights, batch))})
    processes.barrier("done")  # one that ends long before the others counts as dead
    return record


def advance(step: Any, state: State, batch: Batch) -> tuple[State, dict[str, np.ndarray]]:
    """The state after one more step, and its figures.  Raises RunFailed: another process of the group has ended."""
    try:
        state, figures = step(state, batch)
        return state, jax.device_get(figures)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise RunFailed(f"host {jax.process_index()} of {jax.process_count()} has lost another one "
                        f"({first_line(error)}); the same command goes on from the newest checkpoint") from None


def rewind(checkpoints: Checkpoints, layout: State, position: Position, record: dict[str, Any],
           rewinds: int) -> tuple[State, Position]:
    """The newest state before the bad steps, past whose data it goes on.  Raises RunFailed: none, or back too often."""
    found = checkpoints.restore(layout, before=position.step - record["bad"]) if rewinds < REWINDS else None
    if found is None:
        newest = checkpoints.newest()
        kept = f"the checkpoint of step {newest} is kept" if newest else "no checkpoint was written"
        raise RunFailed(
            f"after train.fault.limit = {record['bad']} bad steps in a row a run goes back to a checkpoint, at most "
            f"{REWINDS} times to the same; at step {position.step} loss and gradient norm are {record['loss']} and "
            f"{record['grad_norm']}, and it has gone back {rewinds} times; {kept}; lower optimizer.lr or "
            "optimizer.clip, or lengthen optimizer.warmup")
    state, at = found
    return state, at._replace(offset=position.offset + position.step - at.step)


def bubble(sharded: Sharded, schedule: Schedule, weights: dict[str, jax.Array], batch: Batch) -> dict[str, Any]:
    """The idle share of a step's gradients: counted, and measured against the same ops without the idle ticks."""
    programs = [jax.jit(make_gradients(sharded, table)) for table in (schedule, schedules.without_idle(schedule))]
    seconds = np.zeros((4, 2))
    for turn, which in np.ndindex(seconds.shape):
        begin = time.perf_counter()
        jax.block_until_ready(programs[which](weights, batch, jax.random.key(0)))
        seconds[turn, which] = time.perf_counter() - begin
    step, busy = np.median(seconds[1:], 0).tolist()  # the first turn compiles
    return {"schedule": schedule.name, "bubble": schedule.bubble(), "bubble_measured": 1 - busy / step,
            "step_s": step, "busy_s": busy}


def claim(config: Config) -> Path:
    """The run folder, made if need be.  Raises ConfigError: it holds another's run or files, or cannot be made."""
    run_dir = Path(config.run_dir)
    path = run_dir / "config.json"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        raise ConfigError([f"run_dir must name a folder that can be written; {run_dir} is not ({error}); "
                           "set run_dir to another"]) from None
    if path.exists():
        if differ := differences(from_json(path.read_text()), config):
            raise ConfigError([f"a run folder holds one run; {run_dir} was begun with another config "
                               f"({'; '.join(differ)}); set run_dir to a new folder, or undo the difference"])
    elif any(each.name not in UNCLAIMED for each in run_dir.iterdir()):
        raise ConfigError([f"a run needs a folder of its own; {run_dir} holds other files; "
                           "set run_dir to a new folder"])
    return run_dir


def belongings(config: Config, sharded: Sharded) -> dict[str, str]:
    """The files of a run folder beside its logs.  Raises ConfigError: the run began with another tokenizer."""
    files, kept = tokenizer_files(config.data.tokenizer), Path(config.run_dir) / TOKENIZER_FILE
    if files and kept.is_file() and kept.read_text("utf-8") != files[TOKENIZER_FILE]:
        raise ConfigError([f"a run keeps its tokenizer; data.tokenizer={config.data.tokenizer} is no longer that "
                           f"of {kept}; put that one back, or set run_dir to a new folder"])
    count, active = sharded.parameters()
    devices = f"{config.mesh.devices()} × {sharded.mesh.devices.flat[0].device_kind}"
    summary = json.dumps({"parameters": count, "active_parameters": active, "devices": devices,
                          "jax": jax.__version__, "python": platform.python_version()})
    return {"config.json": to_json(config), "summary.json": summary} | files


def keep(run_dir: Path, files: dict[str, str]) -> None:
    for name, text in files.items() if processes.first() else ():
        put(run_dir / name, text)


def notes(config: Config, corpus: Corpus, sharded: Sharded, start: int) -> Iterator[str]:
    count, active = sharded.parameters()
    yield f"{config.name}: {count:,} parameters, {active:,} active; {config.mesh.words()}; run folder {config.run_dir}"
    if frozen := sum(not sharded.trainable[name] for name in filter(sharded.learned.get, sharded.shapes)):
        trained = sum(math.prod(sharded.shapes[name]) for name in states.trained(sharded, sharded.shapes))
        yield f"{trained:,} of the parameters are trained; {frozen} weights are frozen"
    yield f"text: {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} for validation"
    if not config.data.images and (note := document_note(corpus, config.data.sequence)):
        yield note
    if start:
        yield f"resumed after step {start}"


class Meter:
    """Turns the figures of steps into the lines of metrics.jsonl.

    `wall_s` counts all processes that the run has had, from their start; `goodput` is the share of it that was spent in
    steps whose update is in the weights, but for the first step of a process, which compiles.
    """

    def __init__(self, config: Config, sharded: Sharded, before: list[dict[str, Any]], began: float):
        self.tokens = config.data.batch * config.data.sequence
        peak = meshes.peak_flops(sharded.mesh.devices.flat[0]) * config.mesh.devices()
        self.utilisation = 3 * sharded.flops_per_token() / peak  # per token a second; backward is twice forward
        timed = [record for record in before if "wall_s" in record]
        self.began = began - (timed[-1]["wall_s"] if timed else 0.0)
        self.productive = {record["step"]: record["goodput"] * record["wall_s"] for record in timed}  # s, up to a step
        self.first, self.since = True, time.perf_counter()

    def restart(self) -> None:
        self.since = time.perf_counter()

    def record(self, number: int, figures: dict[str, np.ndarray], reading: float) -> dict[str, Any]:
        """Args: reading: seconds of the step that went by before its batch was there."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        counts = not self.first and not figures["bad"]
        self.productive[number] = self.productive.get(number - 1, 0.0) + seconds * counts
        self.first, speed = False, self.tokens / seconds
        choices = np.maximum(np.sum(figures["load"], -1, keepdims=True), 1)
        return {
            "step": number, "loss": float(figures["loss"]), "balance_loss": float(figures["balance"]),
            "z_loss": float(figures["z"]), "grad_norm": float(figures["grad_norm"]), "lr": float(figures["lr"]),
            "bad": int(figures["bad"]), "skipped": int(figures["skipped"]), "tokens": number * self.tokens,
            "tokens_per_s": speed, "step_s": seconds, "mfu": speed * self.utilisation, "input_share": reading / seconds,
            "wall_s": now - self.began, "goodput": self.productive[number] / (now - self.began),
            "drop_fraction": (figures["dropped"] / choices[:, 0]).tolist(),
            "expert_load": (figures["load"] / choices).tolist()}

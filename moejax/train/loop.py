"""A training run from its config to its last checkpoint."""

import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import config as configs
from moejax.config import Config, ConfigError
from moejax.data.batch import Batch
from moejax.data.loader import (
    Corpus,
    Samples,
    document_note,
    open_corpus,
    train_batch,
    unigram_loss,
    validation_batches,
)
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import mesh as meshes
from moejax.parallel import schedules
from moejax.parallel.schedules import Schedule
from moejax.train import state as states
from moejax.train.checkpoint import Checkpoints
from moejax.train.evaluate import validation_loss
from moejax.train.metrics import MetricsLog, read_metrics
from moejax.train.optimizer import make_optimizer
from moejax.train.progress import Progress
from moejax.train.step import make_evaluation, make_gradients, make_step

# What may differ between a run folder and the config that resumes it: nothing of it changes what is learned.
FREE = ("name", "run_dir", "mesh.", "data.cache", "train.steps", "train.microbatches", "train.remat", "train.eval_",
        "train.log_every", "checkpoint.", "model.moe.dispatcher")
TEMPORARY = "config.json.tmp"


class Diverged(RuntimeError):
    """The loss or the gradient is not a number any more."""


def train(config: Config) -> dict[str, Any]:
    """Train until config.train.steps, from the newest checkpoint of config.run_dir if there is one.

    Returns: the last record of metrics.jsonl.
    Raises:
        ConfigError: the run folder holds a run of another config; the text cannot be used; devices are missing.
        Diverged: NaN or infinity; the last checkpoint is from before.
    """
    schedule = schedules.make(config)
    run_dir = claim(config)

    # Build
    meshes.start(config.mesh)
    corpus = open_corpus(config.data)
    sharded = Sharded(config, meshes.make_mesh(config.mesh))
    optimizer = make_optimizer(config.optimizer, config.train.steps, states.trained(sharded, sharded.axes))
    step, evaluation = make_step(sharded, optimizer, schedule), make_evaluation(sharded)
    samples = Samples(corpus.train, config.data.sequence, config.data.seed)
    held_out = Samples(corpus.validation, config.data.sequence, config.data.seed) if config.data.validation else None

    # Restore
    keep(config, run_dir)
    checkpoints = Checkpoints(run_dir, config.checkpoint.keep)
    start = checkpoints.latest() or 0
    if start:
        place = states.shardings(sharded, optimizer)
        state = checkpoints.restore(states.abstract(sharded, optimizer), place)
    else:
        state = states.fresh(sharded, optimizer)
    describe(config, sharded, run_dir)

    # Train
    last = config.train.steps
    with (closing(checkpoints), MetricsLog(run_dir, start) as log,
          Progress(last, start, log_every=config.train.log_every) as progress):
        record = (read_metrics(run_dir) or [{}])[-1]
        for note in notes(config, corpus, sharded, start):
            progress.say(note)
        meter = Meter(config, sharded)
        if start >= last:
            progress.say(f"{run_dir} has done {start} of {last} steps already; set train.steps higher to go on")
        for number in range(start + 1, last + 1):
            batch = on_mesh(sharded.mesh, train_batch(samples, config.data.batch, number - 1))
            state, figures = step(state, batch)
            record = meter.record(number, jax.device_get(figures))
            if number == 1 and held_out is not None:
                record["unigram_loss"] = unigram_loss(corpus.train, corpus.validation, config.model.vocab)
            if held_out is not None and (number % config.train.eval_every == 0 or number == last):
                batches = validation_batches(held_out, config.data.batch, config.train.eval_batches)
                record["validation_loss"] = validation_loss(sharded, evaluation, state.weights, batches)
                meter.restart()
            log.write(record)
            progress.update(record)
            must_be_finite(record, run_dir, checkpoints.latest())

            # Save
            if number % config.checkpoint.every == 0 or number == last:
                checkpoints.save(number, state)
        if sharded.stages and start < last:
            progress.say("timing the pipeline with and without its idle ticks")
            found = bubble(sharded, schedule, state.weights, batch)
            (run_dir / "pipeline.json").write_text(json.dumps(found) + "\n")
    return record


def bubble(sharded: Sharded, schedule: Schedule, weights: dict[str, jax.Array], batch: Batch) -> dict[str, Any]:
    """The idle share of a step's gradients: counted, and measured against the same ops without the idle ticks."""
    seconds: dict[str, list[float]] = {}
    tables = {"step_s": schedule, "busy_s": schedules.without_idle(schedule)}
    programs = {name: jax.jit(make_gradients(sharded, table)) for name, table in tables.items()}
    for _ in range(4):  # the first compiles
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(weights, batch, jax.random.key(0)))
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
    middle = {name: float(np.median(taken[1:])) for name, taken in seconds.items()}
    return {"schedule": schedule.name, "bubble": schedule.bubble(),
            "bubble_measured": 1 - middle["busy_s"] / middle["step_s"]} | middle


def claim(config: Config) -> Path:
    """The run folder, made if it is not there.

    Raises:
        ConfigError: it holds the run of a config that learns something else, or other files, or cannot be made.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError([f"run_dir is a folder; {run_dir} is a file; set run_dir to another path"])
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"run_dir must name a folder that can be written; {run_dir} is not ({error}); "
                           "set run_dir to another"]) from None
    if path.exists():
        old = dict(configs.leaves(configs.from_json(path.read_text())))
        new = dict(configs.leaves(config))
        differ = [f"{name} is {old[name][1]!r} there and {new[name][1]!r} here" for name in new
                  if old[name][1] != new[name][1] and not name.startswith(FREE)]
        if differ:
            raise ConfigError([f"a run folder holds one run; {run_dir} was begun with another config "
                               f"({'; '.join(differ)}); set run_dir to a new folder, or undo the difference"])
    elif any(each.name != TEMPORARY for each in run_dir.iterdir()):
        raise ConfigError([f"a run needs a folder of its own; {run_dir} holds other files; "
                           "set run_dir to a new folder"])
    return run_dir


def keep(config: Config, run_dir: Path) -> None:
    """Write config.json, whole or not at all: from now on the folder is this config's."""
    fresh = run_dir / TEMPORARY
    fresh.write_text(configs.to_json(config))
    os.replace(fresh, run_dir / "config.json")


def describe(config: Config, sharded: Sharded, run_dir: Path) -> None:
    count, active = sharded.parameters()
    device = sharded.mesh.devices.flat[0]
    (run_dir / "summary.json").write_text(json.dumps({
        "parameters": count, "active_parameters": active, "devices": f"{config.mesh.devices()} × {device.device_kind}",
        "jax": jax.__version__, "python": platform.python_version()}) + "\n")


def notes(config: Config, corpus: Corpus, sharded: Sharded, start: int) -> Iterator[str]:
    count, active = sharded.parameters()
    lengths = " × ".join(f"{axis} {size}" for axis, size in sharded.mesh.shape.items() if size > 1) or "one device"
    yield f"{config.name}: {count:,} parameters, {active:,} active; {lengths}; run folder {config.run_dir}"
    yield f"text: {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} for validation"
    note = document_note(corpus, config.data.sequence)
    if note:
        yield note
    if start:
        yield f"resumed after step {start}"


def must_be_finite(record: dict[str, Any], run_dir: Path, saved: int | None) -> None:
    if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
        return
    kept = f"the checkpoint of step {saved} in {run_dir} is kept" if saved else "no checkpoint was written"
    raise Diverged(f"loss and gradient norm must be finite; at step {record['step']} they are {record['loss']} and "
                   f"{record['grad_norm']}; {kept}; lower optimizer.lr or optimizer.clip, or lengthen optimizer.warmup")


class Meter:
    """Turns the figures of steps into the lines of metrics.jsonl."""

    def __init__(self, config: Config, sharded: Sharded):
        self.config = config
        self.tokens = config.data.batch * config.data.sequence
        peak = meshes.peak_flops(sharded.mesh.devices.flat[0]) * config.mesh.devices()
        self.utilisation = 3 * sharded.flops_per_token() / peak  # per token a second; backward is twice forward
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()

    def record(self, number: int, figures: dict[str, np.ndarray]) -> dict[str, Any]:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        choices = np.maximum(np.sum(figures["load"], -1, keepdims=True), 1)
        speed = self.tokens / seconds
        return {
            "step": number, "loss": float(figures["loss"]), "balance_loss": float(figures["balance"]),
            "z_loss": float(figures["z"]), "grad_norm": float(figures["grad_norm"]), "lr": float(figures["lr"]),
            "tokens": number * self.tokens, "tokens_per_s": speed, "step_s": seconds, "mfu": speed * self.utilisation,
            "drop_fraction": (figures["dropped"] / choices[:, 0]).tolist(),
            "expert_load": (figures["load"] / choices).tolist()}



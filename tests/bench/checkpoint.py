"""What checkpoints cost: of a step, of memory, of a disk and of a restart.  `checkpoint.py [PART …]`."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from startup import MOEJAX, until_line

from moejax.config import Checkpoint, Config, Data, Model, MoE, load_config
from moejax.data.loader import open_corpus
from moejax.data.samples import Samples, train_batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import mesh as meshes
from moejax.parallel.mesh import host_array
from moejax.train import state as states
from moejax.train.checkpoint import Checkpoints, Position
from moejax.train.optimizer import make_optimizer
from moejax.train.step import make_step

EVERY = 20  # steps from save to save


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def overhead(folder: Path) -> dict[str, float]:
    """Mean step time of the demo with a save in every 20 steps, over that without, in turn."""
    config = replace(load_config("configs/demo.py"), run_dir=str(folder / "run"),
                     checkpoint=Checkpoint(every=EVERY))
    meshes.start(config.mesh)
    sharded = Sharded(config, meshes.make_mesh(config.mesh))
    optimizer = make_optimizer(config.optimizer, config.train.steps, states.trained(sharded, sharded.axes))
    step, state = make_step(sharded, optimizer), states.fresh(sharded, optimizer)
    samples = Samples(open_corpus(config.data).train, config.data.sequence, config.data.seed)
    checkpoints, number, means = Checkpoints(config), 0, {True: [], False: []}
    for block in range(18):
        saves = block % 2 == 1
        begin = time.perf_counter()
        for at in range(EVERY):
            number += 1
            state, figures = step(state, on_mesh(sharded.mesh, train_batch(samples, config.data.batch, number)))
            jax.device_get(figures)
            if saves and at == 0:
                checkpoints.save(state, Position(number, 0))
            checkpoints.check(number)
        if block > 1:  # the first two compile
            means[saves].append((time.perf_counter() - begin) / EVERY)
    checkpoints.close()
    ratios = [with_ / without for with_, without in zip(means[True], means[False], strict=True)]
    return {"step with a save in 20 / without (at most 1.02)": round(statistics.median(ratios), 4),
            "from, to": [round(min(ratios), 3), round(max(ratios), 3)],
            "step_s": round(statistics.median(means[False]), 4)}


def disk(folder: Path) -> dict[str, float]:
    """A state of 0.6 GB on one device: the blocking part, and the bandwidth both ways."""
    config = Config(name="x", run_dir=str(folder / "big"), checkpoint=Checkpoint(keep=1), data=Data(sequence=64),
                    model=Model(layers=4, d_model=512, moe=MoE(experts=8, hidden=1024)))
    sharded = Sharded(config, meshes.make_mesh(config.mesh, jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, 10, states.trained(sharded, sharded.axes))
    state = jax.block_until_ready(states.fresh(sharded, optimizer))
    layout = states.abstract(sharded, optimizer)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    taken: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        taken.setdefault(name, []).append(seconds(function))

    checkpoints = Checkpoints(config)
    plain = folder / "plain"

    def write() -> None:
        with plain.open("wb") as file:
            for x in jax.tree.leaves(state):
                file.write(np.asarray(x).data)
            file.flush()
            os.fsync(file.fileno())

    def read() -> list[np.ndarray]:
        """Into memory that is new to the process, as that of a restore is."""
        arrays = [host_array(x.shape, x.dtype) for x in jax.tree.leaves(state)]
        with plain.open("rb") as file:
            for x in arrays:
                file.readinto(x.reshape(-1).view(np.uint8).data)
        return arrays

    for round_ in range(6):
        timed("copy", lambda: [np.array(x, copy=True) for x in jax.tree.leaves(state)])
        begin = time.perf_counter()
        timed("blocking", lambda at=round_: checkpoints.save(state, Position(at + 1, 0)))
        checkpoints.settle()
        taken.setdefault("save", []).append(time.perf_counter() - begin)
        timed("write", write)
        timed("restore", lambda: jax.block_until_ready(checkpoints.restore(layout)[0]))
        timed("read", read)
    checkpoints.close()
    middle = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return {"state_mb": round(size / 1e6),
            "blocking part / copy to host memory (at most 1.3)": round(middle["blocking"] / middle["copy"], 2),
            "save / plain write and fsync, in bandwidth (at least 0.6)": round(middle["write"] / middle["save"], 2),
            "restore / plain read, in bandwidth (at least 0.6)": round(middle["read"] / middle["restore"], 2)} | {
                f"{name}_s": round(value, 3) for name, value in middle.items()}


def restart(folder: Path) -> dict[str, float]:
    """From the start of the process to the first new step of the demo: resumed over fresh."""
    args = ["configs/demo.py", f"data.cache={folder}/cache", "checkpoint.every=1"]
    fresh, resumed = [], []
    for i in range(4):
        run = folder / f"run{i}"
        fresh.append(until_line([*MOEJAX, "train", *args, f"run_dir={run}"], run / "metrics.jsonl", saved=True))
        resumed.append(until_line([*MOEJAX, "train", *args, f"run_dir={run}"], run / "metrics.jsonl"))
    return {"resumed / fresh start (at most 1.5)": round(statistics.median(
        b / a for a, b in zip(fresh[1:], resumed[1:], strict=True)), 2),
        "fresh_s": round(statistics.median(fresh[1:]), 1), "resumed_s": round(statistics.median(resumed[1:]), 1)}


PARTS = {"overhead": overhead, "disk": disk, "restart": restart}


def main() -> None:
    for name, part in PARTS.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps({name: part(Path(folder))}, indent=1), flush=True)


if __name__ == "__main__":
    main()

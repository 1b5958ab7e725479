"""Seconds of one training step of a config on random tokens: `train_step.py CONFIG [STEPS] [key=value …]`, as JSON."""

import json
import resource
import statistics
import sys
import time

import jax
import numpy as np

from moejax.config import load_config
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import mesh as meshes
from moejax.train.optimizer import make_optimizer
from moejax.train.state import fresh, trained
from moejax.train.step import make_step


def measure(config, steps: int) -> dict:
    began = time.perf_counter()
    meshes.start(config.mesh)
    devices = None if config.mesh.fake_devices else jax.devices()[: config.mesh.devices()]
    sharded = Sharded(config, meshes.make_mesh(config.mesh, devices))
    optimizer = make_optimizer(config.optimizer, steps, trained(sharded, sharded.axes))
    state, step = fresh(sharded, optimizer), make_step(sharded, optimizer)
    random = np.random.default_rng(0)
    seconds, cpu, losses = [], [], []
    for _ in range(steps + 2):
        tokens = random.integers(0, config.model.vocab, (config.data.batch, config.data.sequence + 1), dtype=np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32),
                      np.arange(len(tokens), dtype=np.int32))
        start, used = time.perf_counter(), time.process_time()
        state, figures = step(state, on_mesh(sharded.mesh, batch))
        losses.append(float(figures["loss"]))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    median = statistics.median(seconds[2:])
    tokens = config.data.batch * config.data.sequence
    return {"step_s": round(median, 4), "cpu_s": round(statistics.median(cpu[2:]), 4), "first_step_s":
            round(time.perf_counter() - began - sum(seconds[1:]), 2), "tokens_per_s": round(tokens / median, 1),
            "tflops": round(3 * sharded.flops_per_token() * tokens / median / 1e12, 4),
            "loss_first": losses[0], "loss_last": losses[-1], "parameters": sharded.parameters()[0],
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


if __name__ == "__main__":
    path, *rest = sys.argv[1:]
    steps = int(rest.pop(0)) if rest and rest[0].isdigit() else 5
    print(json.dumps(measure(load_config(path, rest), steps)))

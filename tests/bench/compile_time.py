"""Depth costs no compile time: lowering and compiling the train step of 4 and of 64 layers, in turn, as a ratio."""

import json
import statistics
import time

import jax
import numpy as np

from moejax.config import load_config
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.train.optimizer import make_optimizer
from moejax.train.state import abstract, trained
from moejax.train.step import make_step


def compile_seconds(layers: int) -> float:
    config = load_config("configs/tiny.py", [f"model.layers={layers}"])
    sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained(sharded, sharded.axes))
    shape = (config.data.batch, config.data.sequence)
    batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.float32),
                  np.zeros(shape[0], np.int32))
    jax.clear_caches()
    begin = time.perf_counter()
    make_step(sharded, optimizer).lower(abstract(sharded, optimizer), batch).compile()
    return time.perf_counter() - begin


def main() -> None:
    compile_seconds(4)  # the first compilation of a process loads the compiler
    taken = {4: [], 64: []}
    for _ in range(5):
        for layers in taken:
            taken[layers].append(compile_seconds(layers))
    median = {layers: statistics.median(values) for layers, values in taken.items()}
    print(json.dumps({"compile_time": {"64 layers / 4 layers (at most 1.20)": round(median[64] / median[4], 3),
                                       "seconds": {str(k): round(v, 2) for k, v in median.items()}}}, indent=1))


if __name__ == "__main__":
    main()

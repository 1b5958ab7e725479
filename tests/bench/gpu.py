"""On a GPU: ceilings of matmul and copy, a training step of a small MoE in bfloat16, and the MoE layer's overhead.

Takes a few minutes; without a GPU it says so and ends well.
"""

import json
import time

import jax
import jax.numpy as jnp
from moe_layer import dense, layer
from timing import alternate
from train_step import measure

from moejax.config import Config, Data, Mesh, Model, MoE, Train
from moejax.parallel.mesh import peak_flops


def ceilings() -> dict[str, float]:
    """TFLOP/s of a bfloat16 matmul of 8192³, and GB/s of a copy of 2 GiB, read and written."""
    x = jnp.ones((8192, 8192), jnp.bfloat16)
    big = jnp.ones(2**29, jnp.float32)
    cases = {"matmul": (jax.jit(jnp.dot), (x, x)), "copy": (jax.jit(lambda b: b + 1), (big,))}
    seconds = alternate(cases, 10)
    return {"matmul_tflops": round(2 * 8192**3 / seconds["matmul"] / 1e12, 1),
            "copy_gb_s": round(2 * big.nbytes / seconds["copy"] / 1e9, 1)}


def main() -> None:
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus:
        print("bench-gpu: this machine has no GPU that JAX can use; nothing was measured")
        return
    begin = time.perf_counter()
    result = {"device": gpus[0].device_kind, "jax": jax.__version__, "data_sheet_tflops": peak_flops(gpus[0]) / 1e12,
              "ceilings": ceilings()}
    for dispatcher, factor in (("sorted", 1.25), ("blocked", None)):
        config = Config(
            model=Model(layers=8, d_model=1024, heads=16, kv_heads=4, head_dim=64, vocab=32768,
                        moe=MoE(experts=8, hidden=2048, capacity_factor=factor, dispatcher=dispatcher)),
            mesh=Mesh(), data=Data(sequence=1024, batch=16), train=Train(compute="bfloat16"))
        step = measure(config, 10)
        step["mfu"] = round(step["tflops"] * 1e12 / peak_flops(gpus[0]), 4)
        result[f"train step, {dispatcher}"] = step
    seconds = alternate({"sorted": layer("sorted", 1.25), "buffers": dense(1280, True)}, 20)
    result["moe layer, sorted / experts on the same buffers"] = round(seconds["sorted"] / seconds["buffers"], 3)
    print(json.dumps(result | {"bench_s": round(time.perf_counter() - begin, 1)}, indent=1))


if __name__ == "__main__":
    main()

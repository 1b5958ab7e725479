"""MoE layer, forward and backward, against the dense matmuls of the same buffers: ratios measured in one run.

4096 tokens, d 512, 8 experts, top-2, hidden 1024 swiglu, float32, one CPU device.  `sorted` is held against the expert
matmuls of its capacity buffers (factor 1.25), `blocked` (dropless) against those of the exact active tokens.
"""

import json
import sys

import jax
import jax.numpy as jnp
from timing import alternate

from moejax import config as configs
from moejax.model.layers import ACTIVATIONS, Pass, columns
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh

TOKENS, GROUP, D, EXPERTS, HIDDEN = 4096, 512, 512, 8, 1024


def layer(dispatcher: str, factor: float | None):
    """A jitted gradient of one MoE layer in its input and weights, and its inputs."""
    moe = configs.MoE(experts=EXPERTS, hidden=HIDDEN, capacity_factor=factor, dispatcher=dispatcher)
    model = configs.Model(layers=1, d_model=D, hidden=8, moe=moe)
    config = configs.Config(model=model, data=configs.Data(sequence=GROUP, batch=TOKENS // GROUP))
    sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[:1]))
    weights = {name: value for name, value in sharded.init(0).items() if ".feed." in name}
    rest = {name: jnp.zeros(shape) for name, shape in sharded.shapes.items() if name not in weights}

    def run(weights, x, out):
        def device(values, x, out):
            block = sharded.build({name: value[0] if name.startswith("runs") else value
                                   for name, value in values.items()}).runs[0][0]
            y, (_, losses) = block.feed(x, Pass(training=True))
            return jnp.sum(y * out) + 0.01 * losses.balance + 0.001 * losses.z

        specs = jax.sharding.PartitionSpec()
        return sharded.program(device, (specs, specs), specs)(weights | rest, x, out)

    x, out = (jax.random.normal(jax.random.key(i), (TOKENS // GROUP, GROUP, D)) for i in (1, 2))
    return jax.jit(jax.value_and_grad(run, (0, 1))), (weights, x, out)


def dense(rows: int, activation: bool):
    """The gradient of the expert matmuls on [experts, rows] in all three operands."""
    up, down = jnp.ones((EXPERTS, D, 2 * HIDDEN)), jnp.ones((EXPERTS, HIDDEN, D))
    x, out = (jax.random.normal(jax.random.key(i), (EXPERTS, rows, D)) for i in (1, 2))

    def run(x, up, down, out):
        h = jnp.einsum("ecd,edf->ecf", x, up)
        h = ACTIVATIONS["swiglu"](*columns(h.reshape(*h.shape[:2], 2, HIDDEN))) if activation else h[..., :HIDDEN]
        return jnp.sum(jnp.einsum("ecf,efd->ecd", h, down) * out)

    return jax.jit(jax.value_and_grad(run, (0, 1, 2))), (x, up, down, out)


def main() -> None:
    exact, buffers = TOKENS * 2 // EXPERTS, round(TOKENS * 2 // EXPERTS * 1.25)
    cases = {"sorted": layer("sorted", 1.25), "blocked": layer("blocked", None),
             "buffers": dense(buffers, True), "exact": dense(exact, True),
             "buffers, matmuls alone": dense(buffers, False), "exact, matmuls alone": dense(exact, False)}
    seconds = alternate(cases, int(sys.argv[1]) if len(sys.argv) > 1 else 7)
    print(json.dumps({"moe_layer": {
        "sorted / experts on the same buffers (at most 1.10)": round(seconds["sorted"] / seconds["buffers"], 3),
        "blocked / experts on the exact tokens (at most 1.35)": round(seconds["blocked"] / seconds["exact"], 3),
        "sorted / matmuls alone": round(seconds["sorted"] / seconds["buffers, matmuls alone"], 3),
        "blocked / matmuls alone": round(seconds["blocked"] / seconds["exact, matmuls alone"], 3),
        "seconds": {name: round(value, 4) for name, value in seconds.items()}}}, indent=1))


if __name__ == "__main__":
    main()

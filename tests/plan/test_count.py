"""The plan's counts against what the compiler says of the same step."""

import jax
import jax.numpy as jnp
import pytest

from moejax.config import Config, Data, Model, MoE, Train, check, override
from moejax.plan import count
from moejax.plan.budget import alone
from moejax.plan.compile import compile_step

BASE = Config(model=Model(layers=4, d_model=64, heads=8, head_dim=16, hidden=192, vocab=264,
                          moe=MoE(experts=4, hidden=96, group=64)),
              data=Data(sequence=128, batch=32), train=Train(microbatches=1))
LAYOUTS = {
    "one device": [], "dense": ["model.pattern=D"], "both": ["model.pattern=DM", "mesh.data=2"],
    "fsdp": ["mesh.fsdp=8"], "tensor": ["mesh.tensor=4", "mesh.data=2"], "expert": ["mesh.expert=4", "mesh.data=2"],
    "sequence": ["mesh.tensor=4", "mesh.sequence=true", "mesh.fsdp=2"],
    "pipeline": ["mesh.pipeline=4", "mesh.data=2", "train.microbatches=8"],
    "pipeline, full": ["model.layers=8", "mesh.pipeline=4", "mesh.data=2", "train.microbatches=8", "train.remat=full"],
    "zero bubble": ["mesh.pipeline=2", "mesh.expert=2", "mesh.schedule=zero_bubble", "train.microbatches=4"],
    "interleaved": ["mesh.pipeline=2", "mesh.chunks=2", "mesh.schedule=interleaved", "train.microbatches=4"],
    "zero 1": ["mesh.data=8", "mesh.zero1=true"],
    "images": ["model.pattern=VM", "model.vision=clip size=14 patch=7 width=24 layers=2 heads=4 hidden=20",
               "model.cross=last heads=2 head=8", "data.images=2", "mesh.data=2", "mesh.tensor=2"],
}


def made(*overrides: str) -> Config:
    config, problems = override(BASE, overrides)
    assert not problems and not check(config), problems or check(config)
    return config


@pytest.mark.parametrize("name", LAYOUTS)
def test_arguments_traffic_and_flops_are_the_compilers_and_memory_nearly(name):
    found = compile_step(made(*LAYOUTS[name]))
    assert found["predicted"]["arguments"] == found["memory"]["arguments"]
    assert found["flops"][1] == pytest.approx(found["flops"][0], rel=1e-3)
    for axes, (compiled, planned) in found["sent"].items():
        # What is left are the numbers of the clip norm and the step's figures, which XLA sums apart.
        assert abs(compiled - planned) <= 1024, axes
    assert found["predicted"]["temporary"] == pytest.approx(found["memory"]["temporary"], rel=0.15)


def unneeded(config: Config) -> float:
    """FLOPs of a forward pass on pairs of tokens that are not causal: queries go in blocks of 64."""
    model, tokens = config.model, config.data.sequence
    pairs = sum(64 * end for end in range(64, tokens + 1, 64)) - tokens * (tokens + 1) / 2
    return 4 * model.layers * model.heads * model.head_dim * pairs


def test_forward_flops_are_the_formulas():
    config = made("model.pattern=D")
    sharded, _, _ = count.make_program(config)
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sharded.shapes.items()}
    tokens = jax.ShapeDtypeStruct((3, config.data.sequence), jnp.int32)
    dots, _ = count.amounts(jax.make_jaxpr(sharded.forward)(weights, tokens).jaxpr, dict(sharded.mesh.shape))
    needed = sharded.flops_per_token() * config.data.sequence + unneeded(config)
    assert count.flops_of(dots) == pytest.approx(3 * needed, rel=0.02)


@pytest.mark.parametrize("remat, passes", [("none", 3), ("full", 4)])
@pytest.mark.parametrize("pattern", ["D", "M"])
def test_training_is_three_forwards_and_a_fourth_where_layers_are_done_again(remat, passes, pattern):
    """With as many seats as choices; neither the head nor the last matmul of a dense layer is done again."""
    config = alone(made(f"train.remat={remat}", f"model.pattern={pattern}", "model.moe.capacity_factor=1.0"))
    sharded, _, _ = count.make_program(config)
    head = 2 * config.model.vocab * config.model.d_model * config.data.sequence
    layers = sharded.flops_per_token() * config.data.sequence - head + unneeded(config)
    last = (passes - 3) * (pattern == "D") * 4 * 2 * 192 * 64 * config.data.sequence
    assert count.flops_of(count.trace(config).dots) == pytest.approx(passes * layers + 3 * head - last, rel=0.02)


def test_what_nobody_reads_is_not_counted():
    def step(x):
        jnp.dot(x, x)
        return jnp.dot(x, x.T)

    jaxpr, _ = count.dce_jaxpr(jax.make_jaxpr(step)(jnp.ones((3, 3))).jaxpr, [True])
    assert count.flops_of(count.amounts(jaxpr, {})[0]) == 2 * 27


def test_memory_of_a_chain_is_its_two_largest_neighbours():
    def chain(x):
        a = jnp.dot(x, jnp.ones((8, 1024), jnp.float32))  # 8 × 1024
        b = jnp.dot(a, jnp.ones((1024, 64), jnp.float32))  # 8 × 64
        return jnp.dot(b, jnp.ones((64, 4), jnp.float32))

    def loop(x):
        return jax.lax.scan(lambda x, _: (chain(x) @ jnp.ones((4, 8), jnp.float32), None), x, length=5)[0]

    jaxpr = jax.make_jaxpr(loop)(jnp.ones((8, 8), jnp.float32)).jaxpr
    assert 4 * 8 * (1024 + 64) <= count.peak(jaxpr, 1) <= 4 * 8 * (1024 + 64 + 3 * 8)

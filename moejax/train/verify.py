"""Proof that the layout changes no numbers: the same steps on many meshes, dispatchers and microbatchings.

Everything runs in float32 on fake CPU devices and is held against one device.  The tolerances are the rounding of
float32 sums taken in another order: 1e-5 relative on the loss and the clip norm, 1e-4 on the norm of the difference of
each gradient over its norm; routing decisions and drops are equal.
"""

import itertools
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P

from moejax.config import Config, ConfigError, Mesh, check
from moejax.data.batch import Batch
from moejax.data.loader import open_corpus
from moejax.data.samples import make_samples, train_batch
from moejax.model.router import Routing
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import collectives, mesh as meshes
from moejax.parallel.axes import rows
from moejax.train import state as states
from moejax.train.fault import tell
from moejax.train.optimizer import make_optimizer
from moejax.train.step import make_gradients, make_update, pipeline_forwards, step_key

LOSS, GRADIENT = 1e-5, 1e-4


class Run(NamedTuple):
    """What one layout computed: losses and norms by step, and of the first step gradients and decisions."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    decisions: np.ndarray  # [L B T A] expert, or -1 - expert where it was full


def verify(config: Config, steps: int = 2) -> dict[str, Any]:
    """Compare every layout that the config and 8 fake devices (or its own, if more) allow with one device, and print a
    table on stderr on the way.

    Returns: {"passed", "first": what is wrong first, "layouts": [{"layout"} and what `compare` gives]}.
    Raises ConfigError: the config leaves nothing to compare with, or its text cannot be used.
    """
    if steps < 1:
        raise ConfigError([f"--steps must be 1 or more; got {steps}"])
    devices = max(config.mesh.fake_devices, 8)
    meshes.start(replace(config.mesh, fake_devices=devices))
    config = replace(config, train=replace(config.train, compute="float32"))
    with closing(make_samples(config, open_corpus(config.data, config.model.vocab), "train", tell)) as samples:
        batches = [train_batch(samples, config.data.batch, i) for i in range(steps)]
    cases = layouts(config, devices)
    if not cases:
        raise ConfigError([f"no mesh of up to {devices} devices divides this config; set data.batch, model.heads or "
                           "model.moe.experts to even numbers"])
    # The same weights for all: that they start alike on every mesh is the initialisation's business.
    weights = opened(make_sharded(single(config)).init(config.train.seed))
    reference = run(single(config), weights, batches)
    tell(f"relative differences from one device in float32, {steps} steps\n{'layout':<46} {'loss':<7}  {'clip':<7}  "
        f"{'worst':<7}  {'decisions':<10} {'':<8} worst gradient in")
    found = []
    for name, case in cases:
        found.append({"layout": name} | (d := compare(reference, run(case, weights, batches))))
        decisions, mark = f"{d['flips']} differ" if d["flips"] else "equal", "same" if d["passed"] else "DIFFERS"
        tell(f"{name:<46} {d['loss']:>7.1e}  {d['clip_norm']:>7.1e}  {d['gradient']:>7.1e}  {decisions:<10} {mark:<8} "
             f"{d['tensor']}")
    first = next((f"{d['layout']}: {d['wrong'][0]}" for d in found if d["wrong"]), None)
    tell(f"verify: {first}" if first else f"verify: {len(found)} layouts give the same numbers")
    return {"passed": first is None, "first": first, "layouts": found}


def opened(weights: dict[str, Array]) -> dict[str, Array]:
    """Gates that start at 0 set to another number: behind them all gradients would be 0."""
    return {name: value + 0.5 if name.endswith("gate") and "cross." in name else value
            for name, value in weights.items()}


def single(config: Config) -> Config:
    return replace(config, mesh=Mesh(), train=replace(config.train, microbatches=1))


def layouts(config: Config, devices: int) -> list[tuple[str, Config]]:
    """Named variants of the config that its sizes allow: meshes first, then options, dispatchers and microbatches."""
    own, config = config, single(config)
    found: dict[Config, str] = {}

    def add(name: str, mesh: Mesh, *counts: int, **moe: str) -> None:
        """With the first number of microbatches that is allowed, if any is."""
        model = replace(config.model, moe=replace(config.model.moe, **moe))
        every = (replace(config, mesh=mesh, model=model, train=replace(config.train, microbatches=count))
                 for count in counts or ((4, 2, 1) if mesh.pipeline > 1 else (1,)))
        case = next((case for case in every if not check(case)), config)
        if case != config:
            found.setdefault(case, name)

    def fit(*axes: str) -> Mesh | None:
        """The mesh of these axes, each 2 or longer, that uses the most of the devices and that the config allows."""
        every = (Mesh(**dict(zip(axes, lengths, strict=True)))
                 for lengths in itertools.product(range(2, devices + 1), repeat=len(axes)))
        allowed = (mesh for mesh in every if mesh.devices() <= devices)
        return max((mesh for mesh in allowed if not check(replace(config, mesh=mesh))), key=Mesh.devices, default=None)

    for count in (1, 2, 3):
        for axes in itertools.combinations(("data", "fsdp", "pipeline", "expert", "tensor"), count):
            if mesh := fit(*axes):
                add(describe(mesh), mesh)
    if pipe := fit("pipeline", "tensor") or fit("pipeline"):
        uneven = (config.model.layers - pipe.pipeline + 1, *[1] * (pipe.pipeline - 1))
        for changes in ({"schedule": "gpipe"}, {"schedule": "zero_bubble"}, {"schedule": "interleaved", "chunks": 2},
                        {"stage_layers": uneven}):
            for stages in (pipe.pipeline, 2):  # several chunks need more layers
                mesh = replace(pipe, **{"pipeline": stages} | changes)
                add(describe(mesh), mesh)
    add("as configured", replace(own.mesh, fake_devices=0), own.train.microbatches)
    if mesh := fit("data", "tensor"):
        for option in ("sequence", "zero1"):
            add(f"{describe(mesh)} {option}", replace(mesh, **{option: True}))
    base = fit("data", "expert", "tensor") or fit("expert", "tensor") or fit("expert") or fit("data") or Mesh()
    if "M" in config.model.layer_kinds():
        for dispatcher, mesh in itertools.product(("sorted", "blocked", "einsum"), (Mesh(), base)):
            add(f"{describe(mesh)} {dispatcher}", mesh, dispatcher=dispatcher)
    for count, mesh in itertools.product((2, 4), (Mesh(), base)):
        add(f"{describe(mesh)} microbatches {count}", mesh, count)
    # The balance loss of a batch is defined over a microbatch.
    return [(name, case) for case, name in found.items()
            if case.train.microbatches == 1 or config.model.moe.balance_scope != "batch"]


def describe(mesh: Mesh) -> str:
    options = [mesh.schedule] if mesh.pipeline > 1 else []
    options += [f"{mesh.chunks} chunks"] * (mesh.chunks > 1) + [str(list(mesh.stage_layers))] * bool(mesh.stage_layers)
    return " ".join([mesh.words(), *options])


def make_sharded(config: Config) -> Sharded:
    return Sharded(config, meshes.make_mesh(config.mesh, jax.devices()[: config.mesh.devices()]))


def run(config: Config, weights: dict[str, Array], batches: list[Batch]) -> Run:
    """A few training steps of one layout from these weights."""
    sharded = make_sharded(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, states.trained(sharded, sharded.axes))
    state = states.fresh(sharded, optimizer, jax.device_put(weights, sharded.shardings))
    gradients_of = jax.jit(make_gradients(sharded))
    update = jax.jit(make_update(sharded, optimizer), out_shardings=(states.shardings(sharded, optimizer), None))
    losses, norms = [], []
    for number, batch in enumerate(batches):
        placed, key = on_mesh(sharded.mesh, batch), step_key(sharded, state.step)
        gradients, figures = gradients_of(state.weights, placed, key)
        if number == 0:
            decisions = np.asarray(jax.jit(make_decisions(sharded))(state.weights, placed, key))
            first = {name: np.asarray(value) for name, value in gradients.items()}
        state, found = update(state, gradients, figures)
        losses.append(float(found["loss"]))
        norms.append(float(found["grad_norm"]))
    return Run(losses, norms, first, decisions)


def make_decisions(sharded: Sharded) -> Any:
    """(weights, batch, key) -> what the routers decide in training, [L B T A]: the expert, or -1 - it if full."""
    def code(routing: Routing) -> Array:
        return jnp.where(routing.kept, routing.expert, -1 - routing.expert)

    def device(weights: dict[str, Array], batch: Batch, key: Array) -> Array:
        run = sharded.run(training=True, key=key, rows=batch.rows, sequence=False, remat="none")
        if "M" not in sharded.config.model.layer_kinds():
            return jnp.zeros((0, *batch.tokens.shape, 0), jnp.int32) + batch.tokens[None, :, :, None] * 0
        if sharded.stages is None:
            model = sharded.build(weights)
            return code(model(batch.tokens, run, sight=model.see(batch.images, run))[0].routing)
        none = jnp.zeros((), jnp.float32)
        _, found = pipeline_forwards(sharded, weights, batch, run, lambda found: (
            none, None if found is None else code(found[0])), lambda loss, _: none)
        found = jnp.moveaxis(found, 1, 2)  # chunks, slots, microbatches, then a microbatch's sequences
        found = sharded.stages.of_layers(found.reshape(*found.shape[:2], -1, *found.shape[4:]))
        return collectives.total(found, ("pipeline",))

    return sharded.program(device, (rows(sharded.mesh.shape), P()), P(None, *rows(sharded.mesh.shape)))


def compare(a: Run, b: Run) -> dict[str, Any]:
    """How far b is from a.

    Returns: {"loss", "clip_norm", "gradient": the worst, "tensor": where that is, "flips": decisions that differ,
        "passed", "wrong": what is beyond tolerance, the first tensor first}.
    """
    def relative(x: list[float], y: list[float]) -> float:
        return max(abs(p - q) / max(abs(p), 1e-30) if np.isfinite(q) else np.inf for p, q in zip(x, y, strict=True))

    gaps = {name: gap(value, b.gradients[name]) for name, value in a.gradients.items()}
    tensor = max(gaps, key=gaps.__getitem__)
    flips = int(np.sum(a.decisions != b.decisions))
    loss, norm = relative(a.losses, b.losses), relative(a.norms, b.norms)
    wrong = [f"gradient of {name} differs by {value:.1e} of its norm (at most {GRADIENT:.0e})"
             for name, value in gaps.items() if not value <= GRADIENT]
    wrong += [f"loss differs by {loss:.1e} (at most {LOSS:.0e}): {a.losses} and {b.losses}"] * (not loss <= LOSS)
    wrong += [f"clip norm differs by {norm:.1e} (at most {LOSS:.0e}): {a.norms} and {b.norms}"] * (not norm <= LOSS)
    wrong += [f"{flips} routing decisions differ"] * (flips > 0)
    return {"loss": loss, "clip_norm": norm, "gradient": gaps[tensor], "tensor": tensor, "flips": flips,
            "passed": not wrong, "wrong": wrong}


def gap(a: np.ndarray, b: np.ndarray) -> float:
    norm, difference = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    if not np.isfinite(difference):
        return np.inf
    return difference / norm if norm else difference


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

from moejax import config as configs
from moejax.config import Config, ConfigError
from moejax.data.batch import Batch
from moejax.data.loader import open_corpus
from moejax.data.samples import make_samples, train_batch
from moejax.model.router import Routing
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import collectives
from moejax.parallel import mesh as meshes
from moejax.parallel.axes import AXES, rows
from moejax.train import state as states
from moejax.train.fault import tell
from moejax.train.optimizer import make_optimizer
from moejax.train.step import batch_spec, make_gradients, make_update, pipeline_forwards, step_key

LOSS, GRADIENT = 1e-5, 1e-4


class Run(NamedTuple):
    """What one layout computed: losses and norms by step, and of the first step gradients and decisions."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    decisions: np.ndarray  # [L B T A] expert, or -1 - expert where it was full


class Difference(NamedTuple):
    loss: float
    norm: float
    gradient: float  # the worst
    tensor: str  # where that is
    flips: int  # decisions that differ
    wrong: list[str]  # what is beyond tolerance, the first tensor first


def verify(config: Config, steps: int = 2) -> dict[str, Any]:
    """Compare every layout that the config and 8 fake devices (or its own, if more) allow with one device, and print a
    table on stderr on the way.

    Returns: {"passed", "layouts": [{"layout", "loss", "gradient", "tensor", "flips", "clip_norm", "passed"}], "first"}.
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
        d = compare(reference, run(case, weights, batches))
        decisions, mark = f"{d.flips} differ" if d.flips else "equal", "DIFFERS" if d.wrong else "same"
        tell(f"{name:<46} {d.loss:>7.1e}  {d.norm:>7.1e}  {d.gradient:>7.1e}  {decisions:<10} {mark:<8} {d.tensor}")
        found.append((name, d))
    first = next((f"{name}: {d.wrong[0]}" for name, d in found if d.wrong), None)
    tell(f"verify: {first}" if first else f"verify: {len(found)} layouts give the same numbers")
    return {"passed": first is None, "first": first, "layouts": [
        {"layout": name, "loss": d.loss, "clip_norm": d.norm, "gradient": d.gradient, "tensor": d.tensor,
         "flips": d.flips, "passed": not d.wrong} for name, d in found]}


def opened(weights: dict[str, Array]) -> dict[str, Array]:
    """Gates that start at 0 set to another number: behind them all gradients would be 0."""
    return {name: value + 0.5 if name.endswith("gate") and "cross." in name else value
            for name, value in weights.items()}


def single(config: Config) -> Config:
    return replace(config, mesh=configs.Mesh(), train=replace(config.train, microbatches=1))


def layouts(config: Config, devices: int) -> list[tuple[str, Config]]:
    """Named variants of the config that its sizes allow: meshes first, then options, dispatchers and microbatches."""
    found, own = [], config
    config = single(config)

    def add(name: str, case: Config) -> None:
        if not configs.check(case) and case not in [config, *(c for _, c in found)]:
            found.append((name, case))

    def cut(mesh: configs.Mesh, count: int) -> Config:
        return replace(config, mesh=mesh, train=replace(config.train, microbatches=count))

    def add_pipeline(mesh: configs.Mesh) -> None:
        """With the most microbatches that the batch allows."""
        fits = [case for count in (4, 2, 1) if not configs.check(case := cut(mesh, count))]
        if fits:
            add(describe(mesh), fits[0])

    for count in (1, 2, 3):
        for axes in itertools.combinations(("data", "fsdp", "pipeline", "expert", "tensor"), count):
            mesh = largest(config, axes, devices)
            if mesh and mesh.pipeline > 1:
                add_pipeline(mesh)
            elif mesh:
                add(describe(mesh), replace(config, mesh=mesh))
    if pipe := largest(config, ("pipeline", "tensor"), devices) or largest(config, ("pipeline",), devices):
        uneven = (config.model.layers - pipe.pipeline + 1, *[1] * (pipe.pipeline - 1))
        for changes in ({"schedule": "gpipe"}, {"schedule": "zero_bubble"}, {"schedule": "interleaved", "chunks": 2},
                        {"stage_layers": uneven}):
            for stages in (pipe.pipeline, 2):  # several chunks need more layers
                add_pipeline(replace(pipe, **{"pipeline": stages} | changes))
    add("as configured", replace(own, mesh=replace(own.mesh, fake_devices=0)))
    if mesh := largest(config, ("data", "tensor"), devices):
        for option in ("sequence", "zero1"):
            add(f"{describe(mesh)} {option}", replace(config, mesh=replace(mesh, **{option: True})))
    base = next((mesh for axes in (("data", "expert", "tensor"), ("expert", "tensor"), ("expert",), ("data",))
                 if (mesh := largest(config, axes, devices))), configs.Mesh())
    if "M" in config.model.layer_kinds():
        for dispatcher, mesh in itertools.product(("sorted", "blocked", "einsum"), (configs.Mesh(), base)):
            model = replace(config.model, moe=replace(config.model.moe, dispatcher=dispatcher))
            add(f"{describe(mesh)} {dispatcher}", replace(config, model=model, mesh=mesh))
    for count, mesh in itertools.product((2, 4), (configs.Mesh(), base)):
        add(f"{describe(mesh)} microbatches {count}", cut(mesh, count))
    if config.model.moe.balance_scope == "batch":  # whose loss is defined over a microbatch
        found = [(name, case) for name, case in found if case.train.microbatches == 1]
    return found


def largest(config: Config, axes: tuple[str, ...], devices: int) -> configs.Mesh | None:
    """The mesh of these axes, each 2 or longer, that uses the most of the devices and that the config allows."""
    every = (configs.Mesh(**dict(zip(axes, lengths, strict=True)))
             for lengths in itertools.product(range(2, devices + 1), repeat=len(axes)))
    fit = [mesh for mesh in every if mesh.devices() <= devices and not configs.check(replace(config, mesh=mesh))]
    return max(fit, key=configs.Mesh.devices, default=None)


def describe(mesh: configs.Mesh) -> str:
    lengths = [f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1]
    options = [mesh.schedule] if mesh.pipeline > 1 else []
    options += [f"{mesh.chunks} chunks"] * (mesh.chunks > 1) + [str(list(mesh.stage_layers))] * bool(mesh.stage_layers)
    return " ".join([" × ".join(lengths) or "one device", *options])


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

    return sharded.program(device, (batch_spec(sharded), P()), P(None, *rows(sharded.mesh.shape)))


def compare(a: Run, b: Run) -> Difference:
    """How far b is from a."""
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
    return Difference(loss, norm, gaps[tensor], tensor, flips, wrong)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    norm, difference = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    if not np.isfinite(difference):
        return np.inf
    return difference / norm if norm else difference


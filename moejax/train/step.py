"""One training step: gradients inside the one-device program, the optimizer outside it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, P, lax

from moejax.data.batch import Batch
from moejax.model import transformer
from moejax.model.layers import Pass
from moejax.model.loss import cross_entropy
from moejax.model.router import Losses
from moejax.model.sharded import Sharded, on_mesh
from moejax.model.stages import Stages
from moejax.model.transformer import Transformer
from moejax.parallel import collectives, pipeline, schedules
from moejax.parallel.axes import BATCH, missing, rows
from moejax.parallel.schedules import Schedule
from moejax.train.fault import judge
from moejax.train.optimizer import learning_rate
from moejax.train.state import State, optimizer_specs, shardings, trained

Spread = tuple[dict[str, Array], dict[str, Array]]  # weights of a stage, and those that all stages share


class Figures(NamedTuple):
    """Of one step, the same on every device; the router's are summed over tokens, one entry per MoE layer."""

    loss: Array  # nats per token
    balance: Array  # mean of groups, summed over layers, before the coefficient
    z: Array
    load: Array  # [L E] choices of each expert
    dropped: Array  # [L] choices without a seat


def text_loss(model: Transformer, hidden: Array, batch: Batch, run: Pass) -> Array:
    """Sum over this device's tokens, in nats."""
    hidden, weight = model.output(hidden, run)
    return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, batch.targets.reshape(-1),
                         batch.weights.reshape(-1), model.cap)


def router_cost(losses: Losses | None, share: float, sharded: Sharded) -> tuple[Array, Figures]:
    """What the routers' losses add to the objective, and their figures."""
    zero, moe = jnp.zeros((), jnp.float32), sharded.config.model.moe
    if losses is None:
        return zero, Figures(zero, zero, zero, jnp.zeros((0, 1)), jnp.zeros((0,)))
    figures = collectives.agree(Figures(zero, jnp.sum(losses.balance) * share, jnp.sum(losses.z) * share, losses.load,
                                        losses.dropped))
    return moe.balance_loss * figures.balance + moe.z_loss * figures.z, figures


def make_gradients(sharded: Sharded, schedule: Schedule | None = None) -> Callable[..., Any]:
    """(weights, batch, key) -> (gradient of every trained weight, figures), on global arrays.

    The gradients come placed like the optimizer's state: with ZeRO-1 each is summed straight into its shards.
    With a pipeline they are computed as `schedule` says, by default the config's.
    """
    count = sharded.config.train.microbatches
    share = 1 / (count * sharded.config.mesh.batch_shards())  # of a microbatch on a device, for means over tokens
    places = trained(sharded, optimizer_specs(sharded))
    schedule = schedule or (schedules.make(sharded.config) if sharded.stages else None)

    def device(weights: dict[str, Array], batch: Batch, key: Array) -> tuple[dict[str, Array], Figures]:
        tokens = jnp.maximum(collectives.total(jnp.sum(batch.weights), BATCH), 1)
        # Marked as varying here, once, so that the sum over the batch axes is not taken in every layer and microbatch.
        fixed = {name: value for name, value in weights.items() if name not in places}
        moving = {name: collectives.vary(weights[name], missing(sharded.specs[name])) for name in places}

        def objective(moving: dict[str, Array], part: Batch) -> tuple[Array, Figures]:
            """This device's part of what is minimised for one microbatch, and of the figures."""
            model, run = sharded.build(moving | fixed), sharded.run(training=True, key=key, rows=part.rows)
            output, _ = model(part.tokens, run, sight=model.see(part.images, run))
            loss = text_loss(model, output.hidden, part, run) / tokens
            cost, figures = router_cost(output.losses, share, sharded)
            return loss + cost, figures._replace(loss=loss)

        if sharded.stages is None:
            gradients, figures = accumulate(jax.grad(objective, has_aux=True), moving, batch, count)
        else:
            gradients, figures = pipelined(sharded, schedule, moving, fixed, batch, tokens, share, key)
        gradients = {name: reduce(g, sharded.specs[name], places[name]) for name, g in gradients.items()}
        return gradients, collectives.total(figures, (*BATCH, "pipeline"))

    return sharded.program(device, (rows(sharded.mesh.shape), P()), (places, P()))


def pipelined(sharded: Sharded, schedule: Schedule, moving: dict[str, Array], fixed: dict[str, Array], batch: Batch,
              tokens: Array, share: float, key: Array) -> tuple[dict[str, Array], Figures]:
    """The same as `accumulate` where the layers are split over stages."""
    fixed = {name: collectives.vary(value, missing(sharded.specs[name])) for name, value in fixed.items()}
    run, count = sharded.run(training=True, key=key), schedule.microbatches
    spread, back = jax.vjp(lambda moving: spread_out(sharded, moving, fixed, batch, run, count), moving)
    # What F saves waits in buffers, so not the weights; where it saves nothing, B does the part again as a whole.
    run = replace(run, remat={"none": "weights", "full": "none"}.get(run.remat, run.remat))
    parts = stage_parts(sharded.stages, spread, sharded.stages.spread(fixed), split(batch, count), run,
                        lambda found: router_cost(found and found[1], share, sharded), lambda loss, _: loss / tokens)
    *gradients, loss, figures = pipeline.gradients(schedule, parts, *spread, save=sharded.config.train.remat != "full")
    load, dropped = (sharded.stages.of_layers(each) for each in (figures.load, figures.dropped))
    return back(tuple(gradients))[0], Figures(loss, jnp.sum(figures.balance), jnp.sum(figures.z), load, dropped)


def spread_out(sharded: Sharded, moving: dict[str, Array], fixed: dict[str, Array], batch: Batch, run: Pass,
               count: int) -> Spread:
    """`Stages.spread` of the moving weights, with the images of all microbatches, each encoded by one stage before."""
    local, shared = sharded.stages.spread(moving)
    if batch.images is not None:
        found = sharded.stages.see(moving | fixed, batch.images, run)
        found = found.reshape(1, count, -1, *found.shape[1:])
        local["sight"] = jnp.broadcast_to(found, (sharded.config.mesh.chunks, *found.shape[1:]))
    return local, shared


def stage_parts(stages: Stages, spread: Spread, fixed: Spread, batch: Batch, run: Pass,
                of_routing: Callable[[Any], tuple[Array, Any]],
                of_loss: Callable[[Array, Batch], Any]) -> pipeline.Parts:
    """The model as a pipeline runs it.

    Args:
        spread: the weights, as `spread_out` gives them; fixed: those without gradients, as `Stages.spread`.
        batch: this device's, every leaf [microbatches, …].
        of_routing: a part's (Routing, Losses) or None -> (cost, figures).
        of_loss: (a microbatch's summed loss, the microbatch) -> what its last part results in.
    """
    some = pipeline.chunk(spread[0] | fixed[0], 0)  # where it does not matter which

    def pick(m: Array) -> Batch:
        return jax.tree.map(lambda x: x[m], batch)

    def first(shared: dict[str, Array], m: Array) -> Array:
        return stages.build(some, shared | fixed[1]).embed(batch.tokens[m], run)

    def middle(weights: dict[str, Array], x: Array, m: Array, c: Array) -> Any:
        part = pick(m)
        if part.images is not None:
            weights = weights | {"sight": weights["sight"][m]}
        x, found = stages.run(weights, spread[1] | fixed[1], x, replace(run, rows=part.rows), c, part.images)
        cost, figures = of_routing(found)
        return (x, cost), figures

    def last(shared: dict[str, Array], y: Array, m: Array) -> Any:
        model = stages.build(some, shared | fixed[1])
        return of_loss(text_loss(model, model.norm(y), pick(m), run), pick(m))

    return pipeline.Parts(first, middle, last, fixed[0])


def split(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def accumulate(one: Callable[..., Any], weights: dict[str, Array], batch: Batch, count: int) -> Any:
    """The sum of one(weights, microbatch) over `count` microbatches, in float32."""
    if count == 1:
        return one(weights, batch)
    parts = split(batch, count)
    first = one(weights, jax.tree.map(lambda x: x[0], parts))
    rest = jax.tree.map(lambda x: x[1:], parts)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(weights, part)), None

    return lax.scan(add, first, rest)[0]


def reduce(gradient: Array, weight: P, place: P) -> Array:
    """The gradient summed over the batch axes that do not split its weight; over `data` into shards under ZeRO-1."""
    gradient = collectives.total(gradient, tuple(a for a in missing(weight) if a not in place))
    if "data" in place and "data" not in weight:
        return lax.psum_scatter(gradient, "data", scatter_dimension=place.index("data"), tiled=True)
    return gradient


def make_step(sharded: Sharded, optimizer: optax.GradientTransformation,
              schedule: Schedule | None = None) -> Callable[..., Any]:
    """jitted (state, batch) -> (state, figures by name); the state given is consumed."""
    gradients_of, update = make_gradients(sharded, schedule), make_update(sharded, optimizer)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        return update(state, *gradients_of(state.weights, batch, step_key(sharded, state.step)))

    # Else the compiler for CPUs copies the optimizer's moments before it writes over them.
    cpu = isinstance(sharded.mesh, jax.sharding.Mesh) and sharded.mesh.devices.flat[0].platform == "cpu"
    how = {"xla_cpu_copy_insertion_use_region_analysis": True} if cpu else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings(sharded, optimizer), None), compiler_options=how)


def step_key(sharded: Sharded, step: Array) -> Array:
    """Of the random numbers of one step."""
    return jax.random.fold_in(jax.random.key(sharded.config.train.seed), step)


def make_update(sharded: Sharded, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """(state, gradients, figures) -> (state after the step, figures by name), on global arrays."""
    config = sharded.config
    rate = learning_rate(config.optimizer, config.train.steps)

    def update(state: State, gradients: dict[str, Array], figures: Figures) -> tuple[State, dict[str, Array]]:
        norm = optax.tree.norm(gradients)  # of global arrays: every shard counts once
        bad, health = judge(state.health, figures.loss, norm, config.train.fault)
        if config.optimizer.clip:
            scale = jnp.minimum(1.0, config.optimizer.clip / (norm + 1e-12))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        old = trained(sharded, state.weights)
        updates, moments = optimizer.update(gradients, state.optimizer, old)
        weights = state.weights | optax.apply_updates(old, updates) | balanced(sharded, state.weights, figures.load)

        def unless_bad(new: Array, old: Array) -> Array:
            # The counts go on: the learning rate is a function of the step.
            return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(bad, old, new)

        weights, moments = jax.tree.map(unless_bad, (weights, moments), (state.weights, state.optimizer))
        return State(state.step + 1, weights, moments, health), figures._asdict() | {
            "grad_norm": norm, "lr": rate(state.step), "bad": health.bad, "skipped": health.skipped}

    return update


def balanced(sharded: Sharded, weights: dict[str, Array], load: Array) -> dict[str, Array]:
    """Biases of overloaded experts go down and of idle ones up, by a fixed step (arXiv 2408.15664, algorithm 1)."""
    moe = sharded.config.model.moe
    if moe.router != "sigmoid" or "text" in sharded.config.train.freeze:
        return {}
    return {name: weights[name] + moe.bias_rate * jnp.sign(jnp.mean(mine, -1, keepdims=True) - mine)
            for name, layers in transformer.moe_layers(sharded.config.model).items()
            for mine in (load[jnp.array(layers)],)}


def make_evaluation(sharded: Sharded) -> Callable[[dict[str, Array], Batch], tuple[Array, Array]]:
    """jitted (weights, batch) -> (sum of the losses of its tokens in nats, their number)."""
    run = sharded.run(remat="none")

    def device(weights: dict[str, Array], batch: Batch) -> tuple[Array, Array]:
        if sharded.stages:
            found, _ = pipeline_forwards(sharded, weights, batch, run, lambda found: (jnp.zeros(()), ()),
                                         lambda loss, part: (loss, jnp.sum(part.weights)))
        else:
            model = sharded.build(weights)
            output, _ = model(batch.tokens, run, sight=model.see(batch.images, run))
            found = text_loss(model, output.hidden, batch, run), jnp.sum(batch.weights)
        return collectives.total(found, (*BATCH, "pipeline"))

    return jax.jit(sharded.program(device, (rows(sharded.mesh.shape),), (P(), P())))


def validation_loss(sharded: Sharded, evaluation: Callable[..., Any], weights: dict[str, Array],
                    batches: Iterable[Batch]) -> float:
    """Mean over all targets of the batches, in nats per token."""
    loss = tokens = 0.0
    for batch in batches:
        more, count = evaluation(weights, on_mesh(sharded.mesh, batch))
        loss, tokens = loss + float(more), tokens + float(count)
    return loss / tokens


def pipeline_forwards(sharded: Sharded, weights: dict[str, Array], batch: Batch, run: Pass,
                      of_routing: Callable[[Any], tuple[Array, Any]], of_loss: Callable[[Array, Batch], Any]) -> Any:
    """One device's part of a forward pass through the pipeline, as `pipeline.forwards` returns it."""
    mesh, count = sharded.config.mesh, sharded.config.train.microbatches
    weights = {name: collectives.vary(value, missing(sharded.specs[name])) for name, value in weights.items()}
    spread = spread_out(sharded, weights, {}, batch, run, count)
    parts = stage_parts(sharded.stages, spread, ({}, {}), split(batch, count), run, of_routing, of_loss)
    return pipeline.forwards(schedules.forwards(mesh.pipeline, count, mesh.chunks), parts, *spread)

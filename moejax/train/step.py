"""One training step: gradients inside the one-device program, the optimizer outside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from moejax.data.batch import Batch
from moejax.model import transformer
from moejax.model.loss import cross_entropy
from moejax.model.router import Losses
from moejax.model.sharded import Sharded
from moejax.model.transformer import Output
from moejax.parallel import collectives
from moejax.parallel.axes import BATCH, missing, rows
from moejax.train.lr import schedule
from moejax.train.state import State, optimizer_specs, shardings, trained


class Figures(NamedTuple):
    """Of one step, the same on every device; the router's are summed over tokens, one entry per MoE layer."""

    loss: Array  # nats per token
    balance: Array  # mean of groups, summed over layers, before the coefficient
    z: Array
    load: Array  # [L E] choices of each expert
    dropped: Array  # [L] choices without a seat


FIGURES_SPEC = Figures(P(), P(), P(), P(), P())


def objective(sharded: Sharded, weights: dict[str, Array], batch: Batch, tokens: Array, share: float, key: Array,
              training: bool) -> tuple[Array, Figures]:
    """This device's part of what is minimised for one microbatch, and of the figures.

    Args:
        tokens: weight of all targets of the whole step, on all devices.
        share: of this microbatch on this device among all, for means over groups and tokens.
    """
    model = sharded.build(weights)
    run = sharded.run(training=training, key=key, rows=batch.rows)
    output, _ = model(batch.tokens, run)
    hidden = collectives.enter(output.hidden, run.sequence)
    loss = cross_entropy(hidden.reshape(-1, hidden.shape[-1]), model.output_weight(run.dtype),
                         batch.targets.reshape(-1), batch.weights.reshape(-1)) / tokens
    figures = collectives.agree(router_figures(output, share, sharded))
    moe = sharded.config.model.moe
    cost = loss + moe.balance_loss * figures.balance + moe.z_loss * figures.z
    return cost, figures._replace(loss=loss)


def router_figures(output: Output, share: float, sharded: Sharded) -> Figures:
    if output.losses is None:
        zero = jnp.zeros((), jnp.float32)
        return Figures(zero, zero, zero, jnp.zeros((0, 1)), jnp.zeros((0,)))
    losses: Losses = output.losses
    return Figures(jnp.zeros(()), jnp.sum(losses.balance) * share, jnp.sum(losses.z) * share, losses.load,
                   losses.dropped)


def make_gradients(sharded: Sharded) -> Callable[[dict[str, Array], Batch, Array], tuple[dict[str, Array], Figures]]:
    """(weights, batch, key) -> (gradient of every trained weight, figures), on global arrays.

    The gradients come placed like the optimizer's state: with ZeRO-1 each is summed straight into its shards.
    """
    count = sharded.config.train.microbatches
    share = 1 / (count * sharded.config.mesh.batch_shards())
    places = trained(sharded, optimizer_specs(sharded))

    def device(weights: dict[str, Array], batch: Batch, key: Array) -> tuple[dict[str, Array], Figures]:
        tokens = collectives.total(jnp.sum(batch.weights), BATCH)
        # Marked as varying here, once, so that the sum over the batch axes is not taken in every layer and microbatch.
        fixed = {name: value for name, value in weights.items() if name not in places}
        moving = {name: collectives.vary(weights[name], missing(sharded.specs[name])) for name in places}

        def one(moving: dict[str, Array], part: Batch) -> tuple[dict[str, Array], Figures]:
            def cost(moving: dict[str, Array]) -> tuple[Array, Figures]:
                return objective(sharded, moving | fixed, part, tokens, share, key, True)

            (_, figures), gradients = jax.value_and_grad(cost, has_aux=True)(moving)
            return gradients, figures

        gradients, figures = accumulate(one, moving, batch, count)
        gradients = {name: reduce(g, sharded.specs[name], places[name]) for name, g in gradients.items()}
        return gradients, collectives.total(figures, BATCH)

    return sharded.program(device, (Batch(*[rows(sharded.mesh.shape)] * 4), P()), (places, FIGURES_SPEC))


def accumulate(one: Callable[..., Any], weights: dict[str, Array], batch: Batch, count: int) -> Any:
    """The sum of one(weights, microbatch) over `count` microbatches, in float32."""
    if count == 1:
        return one(weights, batch)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
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


def make_step(sharded: Sharded, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """jitted (state, batch) -> (state, figures by name); the state given is consumed."""
    gradients_of, update = make_gradients(sharded), make_update(sharded, optimizer)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        return update(state, *gradients_of(state.weights, batch, step_key(sharded, state.step)))

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings(sharded, optimizer), None))


def step_key(sharded: Sharded, step: Array) -> Array:
    """Of the random numbers of one step."""
    return jax.random.fold_in(jax.random.key(sharded.config.train.seed), step)


def make_update(sharded: Sharded, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """(state, gradients, figures) -> (state after the step, figures by name), on global arrays."""
    config = sharded.config
    rate = schedule(config.optimizer, config.train.steps)

    def update(state: State, gradients: dict[str, Array], figures: Figures) -> tuple[State, dict[str, Array]]:
        norm = optax.tree.norm(gradients)  # of global arrays: every shard counts once
        if config.optimizer.clip:
            scale = jnp.minimum(1.0, config.optimizer.clip / (norm + 1e-12))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        old = trained(sharded, state.weights)
        updates, moments = optimizer.update(gradients, state.optimizer, old)
        new = state.weights | optax.apply_updates(old, updates) | balanced(sharded, state.weights, figures.load)
        return State(state.step + 1, new, moments), figures._asdict() | {"grad_norm": norm, "lr": rate(state.step)}

    return update


def balanced(sharded: Sharded, weights: dict[str, Array], load: Array) -> dict[str, Array]:
    """Biases of overloaded experts go down and of idle ones up, by a fixed step (arXiv 2408.15664, algorithm 1)."""
    moe = sharded.config.model.moe
    if moe.router != "sigmoid":
        return {}
    return {name: weights[name] + moe.bias_rate * jnp.sign(jnp.mean(mine, -1, keepdims=True) - mine)
            for name, layers in transformer.moe_layers(sharded.config.model).items()
            for mine in (load[jnp.array(layers)],)}


def make_evaluation(sharded: Sharded) -> Callable[[dict[str, Array], Batch], tuple[Array, Array]]:
    """jitted (weights, batch) -> (sum of the losses of its tokens in nats, their number)."""

    def device(weights: dict[str, Array], batch: Batch) -> tuple[Array, Array]:
        model, run = sharded.build(weights), sharded.run(remat="none")
        output, _ = model(batch.tokens, run)
        hidden = collectives.enter(output.hidden, run.sequence)
        loss = cross_entropy(hidden.reshape(-1, hidden.shape[-1]), model.output_weight(run.dtype),
                             batch.targets.reshape(-1), batch.weights.reshape(-1))
        return collectives.total((loss, jnp.sum(batch.weights)), BATCH)

    return jax.jit(sharded.program(device, (Batch(*[rows(sharded.mesh.shape)] * 4),), (P(), P())))

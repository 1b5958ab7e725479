"""Who goes where: routers turn logits into a `Routing`, which every dispatcher carries out.

Decisions are taken within a group (M tokens of one sequence): they know nothing of mesh, microbatch, other sequences.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moejax import config as configs
from moejax.parallel import collectives
from moejax.parallel.axes import BATCH

Scores = Float[Array, "R M E"]
Choice = tuple[Int[Array, "R M A"], Float[Array, "R M A"], Scores]  # experts, their weights, and what is balanced


class Routing(NamedTuple):
    """A choices per token; a choice that found its expert full is not kept and adds nothing."""

    expert: Int[Array, "R M A"]
    weight: Float[Array, "R M A"]
    slot: Int[Array, "R M A"]  # place in the expert's queue, from 0
    kept: Bool[Array, "R M A"]


class Losses(NamedTuple):
    """Of one layer on one device; means over its groups or tokens, and counts of choices."""

    balance: Float[Array, ""]
    z: Float[Array, ""]
    share: Float[Array, " E"]  # mean of the router's scores
    load: Float[Array, " E"]  # choices of each expert, before capacity
    dropped: Float[Array, ""]  # choices that found no seat


def capacity(moe: configs.MoE, tokens: int, training: bool) -> int:
    """Seats of an expert in a group: ceil(tokens × active / experts × factor), arXiv 2101.03961 section 2.2."""
    factor = moe.capacity_factor if training else moe.eval_capacity_factor
    if factor is None and moe.router == "expert_choice":  # it fills its seats
        factor = moe.capacity_factor
    if factor is None:
        return tokens  # all could come
    # Rounded first: 50 × 1.1 is 55.00000000000001 in floating point, which is 55 seats and not 56.
    return min(tokens, max(1, math.ceil(round(tokens * moe.active / moe.experts * factor, 6))))


def route(logits: Scores, bias: Float[Array, " E"], moe: configs.MoE, seats: int) -> tuple[Routing, Losses]:
    """The decisions of one layer, and what they cost.  `bias` moves the choice alone, `seats` are as in `capacity`."""
    expert, weight, scores = ROUTERS[moe.router](logits, bias, moe)
    if moe.router == "expert_choice":
        rank = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1, stable=True).astype(jnp.int32)
        slot = collectives.match(rank, scores)  # JAX types an argsort as equal on all devices, whatever was sorted
    else:
        slot = queue(expert, weight, moe)
    routing = Routing(expert, weight, slot, slot < seats)
    chosen = routing.kept if moe.router == "expert_choice" else jnp.ones_like(routing.kept)
    return routing, losses(logits, scores, routing, chosen, moe)


def topk(logits: Scores, bias: Float[Array, " E"], moe: configs.MoE) -> Choice:
    """Softmax before or after choosing k: k = 1 is Switch (arXiv 2101.03961), k = 2 GShard (arXiv 2006.16668)."""
    scores = jax.nn.softmax(logits, -1)
    if moe.softmax == "after":
        best, expert = top(limit(logits, moe), moe.active)
        return expert, jax.nn.softmax(best, -1) * moe.scale, scores
    weight, expert = top(limit(scores, moe), moe.active)
    return expert, normalise(weight, moe), scores


def sigmoid(logits: Scores, bias: Float[Array, " E"], moe: configs.MoE) -> Choice:
    """Independent scores, balanced by a bias on the choice alone (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437)."""
    scores = jax.nn.sigmoid(logits)
    _, expert = top(limit(scores + bias[None, None], moe), moe.active)
    weight = normalise(jnp.take_along_axis(scores, expert, -1), moe)
    return expert, weight, scores / jnp.sum(scores, -1, keepdims=True)


def sparsemixer(logits: Scores, bias: Float[Array, " E"], moe: configs.MoE) -> Choice:
    """The best expert, then the best of the others, each weighed by a softmax over those close to it: SparseMixer
    (arXiv 2409.12136) without the sampling it trains with, also in training; the weights do not sum to 1.
    """
    left, chosen, weights = logits, [], []
    for _ in range(moe.active):
        best = jnp.argmax(lax.stop_gradient(left), -1).astype(jnp.int32)[..., None]
        top_ = pick(lax.stop_gradient(left), best)
        far = (top_ - logits) / jnp.maximum(jnp.abs(logits), top_) > 2 * moe.mixer_gap
        weights.append(pick(jax.nn.softmax(jnp.where(lax.stop_gradient(far), -jnp.inf, left), -1), best))
        chosen.append(best)
        left = jnp.where(jax.nn.one_hot(best[..., 0], logits.shape[-1], dtype=bool), -jnp.inf, left)
    return jnp.concatenate(chosen, -1), jnp.concatenate(weights, -1) * moe.scale, jax.nn.softmax(logits, -1)


def expert_choice(logits: Scores, bias: Float[Array, " E"], moe: configs.MoE) -> Choice:
    """Every expert takes the tokens that score highest with it, of all in the sequence (arXiv 2202.09368)."""
    scores = jax.nn.softmax(logits, -1)
    expert = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
    return expert, scores * moe.scale, scores


ROUTERS: dict[str, Callable[..., Choice]] = {
    "topk": topk, "sigmoid": sigmoid, "sparsemixer": sparsemixer, "expert_choice": expert_choice}


def top(scores: Scores, k: int) -> tuple[Float[Array, "R M A"], Int[Array, "R M A"]]:
    """The k highest scores, highest first, the lower index first among equals."""
    if k > 4:
        best, index = lax.top_k(scores, k)
        return best, index.astype(jnp.int32)
    # A few passes over the experts are several times faster on a CPU than the sort inside top_k.
    chosen, rest = [], lax.stop_gradient(scores)
    for _ in range(k):
        chosen.append(jnp.argmax(rest, -1).astype(jnp.int32))
        rest = jnp.where(jax.nn.one_hot(chosen[-1], scores.shape[-1], dtype=bool), -jnp.inf, rest)
    index = jnp.stack(chosen, -1)
    return pick(scores, index), index


def pick(scores: Scores, index: Int[Array, "R M A"]) -> Float[Array, "R M A"]:
    """scores at index, by comparison: its gradient is a sum, where that of a gather is a scatter."""
    hit = jax.nn.one_hot(index, scores.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(hit, scores[..., None, :], 0), -1)


def limit(scores: Scores, moe: configs.MoE) -> Scores:
    """Group-limited routing (DeepSeek-V3): only the experts of the groups whose two best scores sum highest remain."""
    if moe.active_groups == moe.expert_groups:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], moe.expert_groups, -1)
    best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], -1)
    _, index = lax.top_k(best, moe.active_groups)
    open_ = jnp.any(jax.nn.one_hot(index, moe.expert_groups, dtype=bool), -2)
    return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(scores.shape)


def normalise(weight: Float[Array, "R M A"], moe: configs.MoE) -> Float[Array, "R M A"]:
    return (weight / jnp.sum(weight, -1, keepdims=True) if moe.renormalise else weight) * moe.scale


def queue(expert: Int[Array, "R M A"], weight: Float[Array, "R M A"], moe: configs.MoE) -> Int[Array, "R M A"]:
    """Each choice's place in its expert's queue: all first choices, then all second ones (GShard, algorithm 1), each
    in the order of the tokens (`position`) or of their best weight (`score`, arXiv 2106.05974 section 4).
    """
    if moe.priority == "score":
        order = jnp.argsort(-lax.stop_gradient(weight[..., 0]), axis=1, stable=True)
        expert = jnp.take_along_axis(expert, order[..., None], 1)
    groups, tokens, active = expert.shape
    line = expert.transpose(0, 2, 1).reshape(groups, active * tokens)
    slot = places(line, moe.experts).reshape(groups, active, tokens).transpose(0, 2, 1)
    return jnp.take_along_axis(slot, jnp.argsort(order, axis=1)[..., None], 1) if moe.priority == "score" else slot


def places(line: Int[Array, "R Q"], experts: int) -> Int[Array, "R Q"]:
    """How many earlier entries of the line equal each entry."""
    hit = jax.nn.one_hot(line, experts, dtype=jnp.int32)
    return jnp.sum((jnp.cumsum(hit, axis=1) - hit) * hit, -1).astype(jnp.int32)


def losses(logits: Scores, scores: Scores, routing: Routing, chosen: Bool[Array, "R M A"], moe: configs.MoE) -> Losses:
    """Balance E·Σ f·P (arXiv 2101.03961 equations 4 to 6; even is 1), z (2202.08906 equation 5), load, drops."""
    hit = jax.nn.one_hot(routing.expert, moe.experts, dtype=bool) & chosen[..., None]
    count = jnp.sum(hit, (1, 2)).astype(jnp.float32)  # R E
    total = jnp.sum(count, -1, keepdims=True)
    part, mean = count / total, jnp.mean(scores, 1)
    if moe.balance_scope == "batch":
        choices, every = collectives.total((jnp.sum(count, 0), jnp.sum(total)), BATCH)
        part, mean = (choices / every)[None], collectives.mean(jnp.mean(mean, 0, keepdims=True))
    # Also over the whole batch it is this device's part of a mean over devices.
    balance = collectives.match(moe.experts * jnp.mean(jnp.sum(part * mean, -1)), scores)
    z = jnp.mean(jnp.square(jax.nn.logsumexp(logits, -1)))
    dropped = jnp.sum((chosen & ~routing.kept).astype(jnp.float32))
    return Losses(balance, z, lax.stop_gradient(jnp.mean(scores, (0, 1))), jnp.sum(count, 0), dropped)

"""Tokens to experts and back: three dispatchers that carry out the same `Routing`.

A dispatcher takes this device's tokens and a Routing and returns the weighted sum of the experts' outputs.  With an
`expert` axis longer than 1, `einsum` and `sorted` exchange buffers of a fixed capacity, and `blocked`, which has no
capacity to rely on, collects the tokens of the axis, works for its own experts and delivers the partial sums.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moejax.model.layers import columns, lean
from moejax.model.router import Routing
from moejax.parallel import collectives

BLOCKS = (512, 128)  # rows of one matmul of `blocked`: as many of the first as are full, then of the last


Biases = tuple[Float[Array, "E U F"], Float[Array, "E D"]] | None  # before the activation, and of outputs


class Experts(NamedTuple):
    """The experts that live on this device.  Over the tensor shards, biases of outputs add up to what they are."""

    up: Float[Array, "E D U F"]
    down: Float[Array, "E F D"]
    activation: Callable[..., Array]  # of ACTIVATIONS
    biases: Biases = None

    def __call__(self, x: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        h = jnp.einsum("ecd,edf->ecf", x, self.up.reshape(*self.up.shape[:2], -1))
        h = h.reshape(*h.shape[:2], *self.up.shape[2:])
        h = h if self.biases is None else h + self.biases[0][:, None]
        y = lean(lambda *h: jnp.einsum("ecf,efd->ecd", self.activation(*h), self.down))(*columns(h))
        return y if self.biases is None else y + self.biases[1][:, None]

    def at_capacity(self, buffers: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        """The same for buffers of all experts, each computed where it lives."""
        return collectives.exchange(self(collectives.exchange(buffers, 0, 1)), 1, 0)


def einsum(x: Float[Array, "R M D"], routing: Routing, seats: int, experts: Experts) -> Float[Array, "R M D"]:
    """One-hot matmuls, as in GShard (arXiv 2006.16668): slow and obvious, the twin that tests the others."""
    groups, _, size = x.shape
    count = experts.up.shape[0] * lax.axis_size("expert")
    to_expert = jax.nn.one_hot(routing.expert, count, dtype=jnp.float32) * routing.kept[..., None].astype(jnp.float32)
    to_seat = jax.nn.one_hot(routing.slot, seats, dtype=jnp.float32)
    dispatch = jnp.einsum("rmae,rmac->rmec", to_expert, to_seat).astype(x.dtype)
    combine = jnp.einsum("rmae,rmac,rma->rmec", to_expert, to_seat, routing.weight)
    buffers = jnp.einsum("rmec,rmd->ercd", dispatch, x).reshape(count, groups * seats, size)
    out = experts.at_capacity(buffers).reshape(count, groups, seats, size)
    return jnp.einsum("rmec,ercd->rmd", combine, out.astype(jnp.float32)).astype(x.dtype)


def sorted_(x: Float[Array, "R M D"], routing: Routing, seats: int, experts: Experts) -> Float[Array, "R M D"]:
    """Buffers of `seats` rows per group and expert, filled and emptied by gathers in both directions."""
    groups, tokens, size = x.shape
    count = experts.up.shape[0] * lax.axis_size("expert")
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    seat = (routing.expert * groups + group) * seats + routing.slot
    plan = Plan.make(seat, routing.kept, count * groups * seats)
    x, weight = collectives.match((x, routing.weight), x, routing.weight, experts.up)
    buffers = pack(x.reshape(-1, size), plan).reshape(count, groups * seats, size)
    out = experts.at_capacity(buffers).reshape(-1, size)
    return unpack(out, weight.reshape(groups * tokens, -1), plan).reshape(x.shape)


def blocked(x: Float[Array, "R M D"], routing: Routing, seats: int, experts: Experts) -> Float[Array, "R M D"]:
    """Exact: tokens ordered by expert, each expert's run cut into blocks; nothing is computed for absent tokens."""
    size, local = x.shape[-1], experts.up.shape[0]
    x, weight = collectives.match((x, routing.weight), x, routing.weight, experts.up)
    rows, weight, expert, slot, kept = map(collectives.collect, (x, weight, routing.expert, routing.slot, routing.kept))
    first = collectives.index("expert") * local
    mine = kept & (expert >= first) & (expert < first + local)
    hit = jax.nn.one_hot(expert - first, local, dtype=bool)
    load = jnp.sum((hit & mine[..., None]).astype(jnp.int32), (1, 2))  # R E
    ends = jnp.cumsum(jnp.sum(load, 0))
    begins = ends - jnp.sum(load, 0)
    before = begins[None] + jnp.cumsum(load, 0) - load  # where each group's choices of each expert begin
    seat = jnp.sum(jnp.where(hit, before[:, None, None, :], 0), -1) + slot
    plan = Plan.make(seat, mine, mine.size + BLOCKS[-1])  # the last block of the last expert may reach past the end
    h = pack(rows.reshape(-1, size), plan)
    h = run_blocks(h, experts.up, experts.down, experts.biases, begins, ends, experts.activation)
    y = unpack(h, weight.reshape(rows.shape[0] * rows.shape[1], -1), plan)
    return collectives.deliver(y.reshape(rows.shape))


DISPATCHERS: dict[str, Callable[[Array, Routing, int, Experts], Array]] = {
    "einsum": einsum, "sorted": sorted_, "blocked": blocked}


class Plan(NamedTuple):
    """Which of N tokens (A choices each) sits in which of Q seats, in both directions."""

    seat: Int[Array, "N A"]  # of every choice; anything where not kept
    kept: Array  # Bool "N A"
    choice: Int[Array, " Q"]  # token × A + a in every seat; N × A where it is empty

    @classmethod
    def make(cls, seat: Int[Array, "R M A"], kept: Array, seats: int) -> "Plan":
        active = seat.shape[-1]
        empty = collectives.match(jnp.full(seats, seat.size, jnp.int32), seat)
        target = jnp.where(kept, seat, seats).reshape(-1)
        choice = empty.at[target].set(jnp.arange(seat.size, dtype=jnp.int32), mode="drop", unique_indices=True)
        return cls(jnp.where(kept, seat, 0).reshape(-1, active), kept.reshape(-1, active), choice)

    def token(self) -> Int[Array, " Q"]:
        return jnp.minimum(self.choice // self.seat.shape[1], self.seat.shape[0] - 1)

    def sum_of(self, rows: Float[Array, "Q D"], weight: Float[Array, "N A"]) -> Float[Array, "N D"]:
        """Each token's weighted sum of the rows in its seats; in float32, then as rows."""
        weight = jnp.where(self.kept, weight, 0)
        return sum(weight[:, a, None] * take(rows, self.seat[:, a]).astype(jnp.float32)
                   for a in range(weight.shape[1])).astype(rows.dtype)


def take(rows: Float[Array, "Q ..."], index: Int[Array, " N"]) -> Float[Array, "N ..."]:
    return rows.at[index].get(mode="promise_in_bounds")


# DO NOT leave the gradients of the two gathers below to autodiff: it makes scatter-adds of them, slow on every backend.
# Rows of empty seats are some token's: nobody reads what becomes of them, and `unpack` makes their gradient zero.


@jax.custom_vjp
def pack(x: Float[Array, "N D"], plan: Plan) -> Float[Array, "Q D"]:
    """The token of every seat."""
    return take(x, plan.token())


def pack_backward(plan: Plan, grad: Array) -> tuple[Array, None]:
    return plan.sum_of(grad, jnp.ones(plan.seat.shape, jnp.float32)), None


pack.defvjp(lambda x, plan: (pack(x, plan), plan), pack_backward)


@jax.custom_vjp
def unpack(rows: Float[Array, "Q D"], weight: Float[Array, "N A"], plan: Plan) -> Float[Array, "N D"]:
    """Every token's weighted sum over its seats."""
    return plan.sum_of(rows, weight)


def unpack_backward(saved: tuple[Array, Array, Plan], grad: Array) -> tuple[Array, Array, None]:
    rows, weight, plan = saved
    full = plan.choice < weight.size
    by_seat = jnp.where(full, take(weight.reshape(-1), jnp.minimum(plan.choice, weight.size - 1)), 0)
    d_rows = (by_seat[:, None] * take(grad, plan.token()).astype(jnp.float32)).astype(rows.dtype)
    d_weight = jnp.stack([jnp.sum((grad * take(rows, plan.seat[:, a])).astype(jnp.float32), -1)
                          for a in range(weight.shape[1])], -1)
    return d_rows, jnp.where(plan.kept, d_weight, 0), None


unpack.defvjp(lambda rows, weight, plan: (unpack(rows, weight, plan), (rows, weight, plan)), unpack_backward)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def run_blocks(x: Float[Array, "Q D"], up: Float[Array, "E D U F"], down: Float[Array, "E F D"], biases: Biases,
               begins: Int[Array, " E"], ends: Int[Array, " E"], activation: Any) -> Float[Array, "Q D"]:
    """Rows begins[e]:ends[e] through expert e; rows beyond the last end are left alone."""
    return blocks_forward(x, up, down, biases, begins, ends, activation)[0]


def over_blocks(block: Callable[[Array, int, Any], Any], begin: Array, end: Array, rows: int, carry: Any) -> Any:
    """carry after block(first row, size, carry) from begin to end of all `rows`; the last may reach past the end."""
    for size in (size for size in BLOCKS if size <= rows):
        count = (end - begin + (size - 1 if size == BLOCKS[-1] else 0)) // size
        carry = lax.fori_loop(0, count, lambda i, carry, at=begin, size=size: block(at + i * size, size, carry), carry)
        begin = begin + count * size
    return carry


def blocks_forward(x: Array, up: Array, down: Array, biases: Any, begins: Array, ends: Array, activation: Any) -> Any:
    gates = up.shape[2:]

    def expert(carry: Any, inputs: Any) -> tuple[Any, None]:
        up, down, biases, begin, end = inputs

        def block(at: Array, size: int, carry: Any) -> Any:
            # A block may reach into the next expert's rows: that expert, which comes later, writes them again.
            h, y = carry
            wide = lax.dynamic_slice_in_dim(x, at, size) @ up.reshape(up.shape[0], -1)
            wide = wide if biases is None else wide + biases[0].reshape(1, -1)
            narrow = activation(*columns(wide.reshape(size, *gates))) @ down
            narrow = narrow if biases is None else narrow + biases[1][None]
            return lax.dynamic_update_slice_in_dim(h, wide, at, 0), lax.dynamic_update_slice_in_dim(y, narrow, at, 0)

        return over_blocks(block, begin, end, x.shape[0], carry), None

    h = jnp.zeros((x.shape[0], gates[0] * gates[1]), x.dtype)
    carry = collectives.match((h, jnp.zeros_like(x)), x, up, down, begins)
    (h, y), _ = lax.scan(expert, carry, (up, down, biases, begins, ends))
    return y, (x, h, up, down, biases, begins, ends)


def blocks_backward(activation: Any, saved: Any, grad: Array) -> tuple[Any, ...]:
    x, h, up, down, biases, begins, ends = saved

    def expert(dx: Array, inputs: Any) -> tuple[Array, Any]:
        up, down, biases, begin, end = inputs

        def block(at: Array, size: int, carry: Any) -> Any:
            dx, d_up, d_down, d_biases = carry
            mine = (at + jnp.arange(size) < end)[:, None]
            dy = jnp.where(mine, lax.dynamic_slice_in_dim(grad, at, size), 0)
            wide = lax.dynamic_slice_in_dim(h, at, size).reshape(size, *up.shape[1:])
            a, back = jax.vjp(lambda wide: activation(*columns(wide)), wide)
            dh = back(dy @ down.T)[0].reshape(size, -1)
            if biases is not None:
                d_biases = (d_biases[0] + jnp.sum(dh, 0).reshape(biases[0].shape), d_biases[1] + jnp.sum(dy, 0))
            rows = lax.dynamic_slice_in_dim(x, at, size)
            dx = lax.dynamic_update_slice_in_dim(dx, dh @ up.reshape(up.shape[0], -1).T, at, 0)
            return dx, d_up + (rows.T @ dh).reshape(up.shape), d_down + a.T @ dy, d_biases

        start = collectives.match(jax.tree.map(jnp.zeros_like, (up, down, biases)), dx)
        dx, *d_weights = over_blocks(block, begin, end, x.shape[0], (dx, *start))
        return dx, d_weights

    dx = collectives.match(jnp.zeros_like(x), x, h, grad, up, begins)
    dx, (d_up, d_down, d_biases) = lax.scan(expert, dx, (up, down, biases, begins, ends))
    return dx, d_up, d_down, d_biases, None, None


run_blocks.defvjp(blocks_forward, blocks_backward)

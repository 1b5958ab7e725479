"""One executor for every pipeline schedule, inside the one-device program.

The ticks of the table are the steps of `lax.scan`s.  A backward computes its part again from the saved input, and
takes the gradient of that alone, so that nothing grows with the number of microbatches but the table; autodiff never
sees a scan over ticks.  Memory and traffic are planned from the table before anything runs: which slot of which buffer
holds what arrives, and until when.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax.parallel import collectives
from moejax.parallel.collectives import only_if
from moejax.parallel.schedules import Schedule


class Parts(NamedTuple):
    """What is run, for microbatch m and chunk c; both are traced numbers."""

    first: Callable[[Any, Array], Array]  # (shared weights, m) -> x
    middle: Callable[[Any, Array, Array, Array], Any]  # (chunk's weights, x, m, c) -> ((y, cost), figures)
    last: Callable[[Any, Array, Array], Any]  # (shared weights, y, m) -> cost, or in `forwards` anything to be summed


class Plan(NamedTuple):
    """A schedule as numbers for the machine: columns [tick, stage], and how many slots each buffer needs."""

    columns: dict[str, np.ndarray]
    inputs: int
    gradients: int
    later: int


def lower(schedule: Schedule, train: bool = True) -> Plan:
    """Slots for everything that waits: stage inputs until their B, gradients from the next part until they are used,
    and what B leaves to W.  The last part's F is left out in training, as its B computes it anyway.
    """
    ticks, stages = len(schedule.ticks), schedule.stages
    last = stages * schedule.chunks - 1
    at = schedule.at
    names = [f"{kind}_{what}" for kind in "fbw" for what in ("on", "m", "chunk", "slot", "first", "last")]
    columns = {name: np.zeros((ticks, stages), np.int32) for name in [*names, "b_got", "b_later", "get_x", "get_dy"]}
    for tick, stage, op in schedule.ops():
        kind, part = op.kind.lower(), op.chunk * stages + stage
        skipped = train and kind == "f" and part == last and part > 0
        values = {"on": not skipped, "m": op.microbatch, "chunk": op.chunk, "first": part == 0, "last": part == last}
        for what, value in values.items():
            columns[f"{kind}_{what}"][tick, stage] = value

    def tick_of(kind: str, m: int, part: int) -> int:
        return at[kind, m, part]

    def allocate(waits: Iterable[tuple[int, int, int, Any]], fill: Callable[[int, int, Any, int], None]) -> int:
        """Slots for (stage, from tick, to tick, what): the lowest that is free; returns how many there are."""
        busy: dict[int, list[int]] = {stage: [] for stage in range(stages)}  # until when, by slot
        for stage, begin, end, what in sorted(waits, key=lambda wait: wait[:3]):
            slot = next((i for i, until in enumerate(busy[stage]) if until < begin), len(busy[stage]))
            busy[stage][slot:slot + 1] = [end]
            fill(stage, begin, what, slot)
        return max(map(len, busy.values()))

    use = "B" if train else "F"
    inputs = [(part % stages, tick_of("F", m, part - 1) + 1 if part else tick_of("F", m, 0), tick_of(use, m, part),
               (m, part)) for kind, m, part in at if kind == "F"]
    arriving = [(part % stages, tick_of("B", m, part + 1) + 1, tick_of("B", m, part), (m, part))
                for kind, m, part in at if kind == "B" and part < last]
    owed = [(part % stages, tick_of("B", m, part), tick_of("W", m, part), (m, part)) for kind, m, part in at
            if kind == "W"]

    def fill_input(stage: int, begin: int, what: tuple[int, int], slot: int) -> None:
        m, part = what
        columns["f_slot"][tick_of("F", m, part), stage] = slot
        if train:
            columns["b_slot"][tick_of("B", m, part), stage] = slot
        if part:
            got["get_x"][begin, stage] = slot

    def fill_gradient(stage: int, begin: int, what: tuple[int, int], slot: int) -> None:
        columns["b_got"][tick_of("B", *what), stage] = slot
        got["get_dy"][begin, stage] = slot

    def fill_owed(stage: int, begin: int, what: tuple[int, int], slot: int) -> None:
        columns["b_later"][begin, stage] = slot
        columns["w_slot"][tick_of("W", *what), stage] = slot

    got = {name: np.full((ticks, stages), -1, np.int32) for name in ("get_x", "get_dy")}
    sizes = (allocate(inputs, fill_input), allocate(arriving, fill_gradient), allocate(owed, fill_owed))
    for name, size in zip(got, sizes, strict=False):
        columns[name] = np.where(got[name] < 0, size, got[name])  # the slot after the last is for what nobody needs
    return Plan(columns, *sizes)


def gradients(schedule: Schedule, parts: Parts, weights: Any, shared: Any) -> tuple[Any, Any, Array, Any]:
    """One device's part of the gradients of all costs of all microbatches.

    Args:
        weights: of this stage, every leaf [chunks, …]; shared: of `first` and `last`.
    Returns: gradients of weights and of shared, in float32; the sum of the last parts' costs; the sums of the figures,
        [chunks, …].
    """
    plan = lower(schedule)
    rows = {name: jnp.asarray(column)[:, collectives.index("pipeline")] for name, column in plan.columns.items()}
    x, kind = kinds(parts, weights, shared)
    zero = collectives.zeros(x)
    carry = {
        "x": ring(x, plan.inputs), "y": zero, "dy": ring(x, plan.gradients), "dx": zero,
        "weights": zeros_like(weights), "shared": zeros_like(shared),
        "loss": jnp.zeros((), jnp.float32), "figures": stacked(kind[1], schedule.chunks)}

    def make(does: set[str]) -> Callable[[Any, Any], Any]:
        def tick(carry: Any, row: dict[str, Array]) -> tuple[Any, None]:
            new = carry | {"x": write(carry["x"], row["get_x"], carry["y"])}
            if "B" in does:
                new["dy"] = write(carry["dy"], row["get_dy"], carry["dx"])
            if "F" in does:
                new["x"], new["y"], _ = forward(parts, weights, shared, new["x"], row, (x, kind))
            if "B" in does:
                # Everything of the forward first: see collectives.after.
                new |= backward(parts, weights, shared, new, row)
            if "F" in does:
                new["y"] = collectives.pass_on(collectives.after(new["y"], new["dx"]), 1)
            if "B" in does:
                new["dx"] = collectives.pass_on(collectives.after(new["dx"], new["y"]), -1)
            return new, None

        return tick

    everything = jax.eval_shape(make({"F", "B"}), carry, jax.tree.map(lambda column: column[0], rows))[0]
    carry = collectives.cast(carry, everything)
    for begin, end, does in phases(schedule):
        carry, _ = lax.scan(make(does), carry, {name: column[begin:end] for name, column in rows.items()})
    return carry["weights"], carry["shared"], carry["loss"], carry["figures"]


def forwards(schedule: Schedule, parts: Parts, weights: Any, shared: Any) -> tuple[Any, Any]:
    """Only forward: the sum of what `last` gives, and the figures of every microbatch, [chunks, microbatches, …]."""
    plan = lower(schedule, train=False)
    here = collectives.index("pipeline")
    rows = {name: jnp.asarray(column)[:, here] for name, column in plan.columns.items()}
    x, kind = kinds(parts, weights, shared)

    def tick(carry: Any, row: dict[str, Array]) -> tuple[Any, Any]:
        xs, y, result = carry
        xs, y, figures = forward(parts, weights, shared, write(xs, row["get_x"], y), row, (x, kind))
        result = only_if(row["f_on"] * row["f_last"] > 0, lambda y, result: add(result, parts.last(shared, y, row["f_m"])),
                         lambda y, result, kind: result, y, result)
        return (xs, collectives.pass_on(collectives.after(y, result), 1), result), figures

    result = collectives.zeros(jax.eval_shape(parts.last, shared, x, jnp.zeros((), jnp.int32)))
    carry = (ring(x, plan.inputs), collectives.zeros(x), result)
    carry = collectives.cast(carry, jax.eval_shape(tick, carry, jax.tree.map(lambda column: column[0], rows))[0])
    (_, _, result), figures = lax.scan(tick, carry, rows)
    when = np.array([[[schedule.at["F", m, c * schedule.stages + s] for m in range(schedule.microbatches)]
                      for c in range(schedule.chunks)] for s in range(schedule.stages)])
    return result, jax.tree.map(lambda found: found[jnp.asarray(when)[here]], figures)


def forward(parts: Parts, weights: Any, shared: Any, xs: Array, row: dict[str, Array], kind: Any) -> Any:
    """One F, if there is one: the inputs with this one, y, figures."""
    m, c, slot = row["f_m"], row["f_chunk"], row["f_slot"]
    x = only_if(row["f_on"] * row["f_first"] > 0, lambda xs: parts.first(shared, m), lambda xs, _: read(xs, slot), xs)
    x = collectives.cast(x, kind[0])
    xs = write(xs, jnp.where(row["f_on"] > 0, slot, xs.shape[0] - 1), x)

    def run(x: Array) -> Any:
        (y, _), figures = parts.middle(chunk(weights, c), x, m, c)
        return y, figures

    return xs, *only_if(row["f_on"] > 0, run, lambda x, kind: collectives.zeros(kind), x)


def backward(parts: Parts, weights: Any, shared: Any, carry: Any, row: dict[str, Array]) -> dict[str, Any]:
    """One B, if there is one: the gradient of its input, and the sums with what it adds to them."""
    m, c = row["b_m"], row["b_chunk"]
    x = collectives.after(read(carry["x"], row["b_slot"]), carry["y"])
    sums = {name: carry[name] for name in ("weights", "shared", "loss", "figures")}

    def run(x: Array, sums: Any) -> Any:
        (y, cost), pull, figures = jax.vjp(lambda w, x: parts.middle(w, x, m, c), chunk(weights, c), x, has_aux=True)

        def head(shared_sum: Any, loss: Array) -> Any:
            cost, (more, dy) = jax.value_and_grad(parts.last, (0, 1))(shared, y, m)
            return dy, add(shared_sum, more), loss + cost

        def embedding(shared_sum: Any) -> Any:
            return add(shared_sum, jax.vjp(lambda shared: parts.first(shared, m), shared)[1](dx)[0])

        dy, shared_sum, loss = only_if(row["b_last"] > 0, head, lambda *sums_kind: (
            read(carry["dy"], row["b_got"]), *sums_kind[:2]), sums["shared"], sums["loss"])
        more, dx = pull((collectives.match(dy, y), collectives.match(jnp.ones((), cost.dtype), cost)))
        shared_sum = only_if(row["b_first"] > 0, embedding, lambda shared_sum, kind: shared_sum, shared_sum)
        return dx, {"weights": add_chunk(sums["weights"], c, more), "shared": shared_sum, "loss": loss,
                    "figures": add_chunk(sums["figures"], c, figures)}

    dx, sums = only_if(row["b_on"] > 0, run, lambda x, sums, kind: (collectives.zeros(kind[0]), sums), x, sums)
    return {"dx": dx} | sums


def phases(schedule: Schedule) -> list[tuple[int, int, set[str]]]:
    """(first tick, end, kinds of ops) of warm-up, steady state and drain: no tick pays for what none of it does."""
    busy = [{op.kind for cell in row for op in cell} for row in schedule.ticks]
    steady = next((i for i, kinds in enumerate(busy) if kinds - {"F"}), len(busy))
    drain = max((i for i, kinds in enumerate(busy) if "F" in kinds), default=-1) + 1
    cuts = sorted({0, steady, max(steady, drain), len(busy)})
    return [(a, b, set().union(*busy[a:b])) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def kinds(parts: Parts, weights: Any, shared: Any) -> tuple[Any, Any]:
    """Types of an activation between parts, and of what `middle` returns: (y, cost), figures."""
    zero = collectives.vary(jnp.zeros((), jnp.int32), ("pipeline",))
    x = jax.eval_shape(parts.first, shared, zero)

    def middle(x: Array) -> Any:
        return parts.middle(chunk(weights, zero), x, zero, zero)

    for _ in range(2):  # x varies over as much as y does
        found = jax.eval_shape(middle, x)
        x = found[0][0]
    return x, found


def ring(kind: jax.ShapeDtypeStruct, slots: int) -> Array:
    """Zeros for so many of these, and one more for what nobody needs."""
    zero = collectives.zeros(kind)
    return collectives.match(jnp.zeros((slots + 1, *zero.shape), zero.dtype), zero)


def read(buffer: Array, slot: Array) -> Array:
    return lax.dynamic_index_in_dim(buffer, slot, 0, keepdims=False)


def write(buffer: Array, slot: Array, x: Array) -> Array:
    buffer, x, slot = collectives.match((buffer, x, slot), buffer, x, slot)
    return lax.dynamic_update_index_in_dim(buffer, x, slot, 0)


def chunk(weights: Any, c: Array) -> Any:
    return jax.tree.map(lambda w: w[0] if w.shape[0] == 1 else read(w, c), weights)


def add(sums: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def add_chunk(sums: Any, c: Array, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b[None] if a.shape[0] == 1 else a.at[c].add(b), sums, more)


def zeros_like(weights: Any) -> Any:
    return jax.tree.map(lambda w: collectives.match(jnp.zeros(w.shape, jnp.float32), w), weights)


def stacked(kind: Any, chunks: int) -> Any:
    return jax.tree.map(lambda one: collectives.match(jnp.zeros((chunks, *one.shape), one.dtype),
                                                      collectives.zeros(one)), kind)

"""One executor for every pipeline schedule, inside the one-device program.

The ticks of the table are the steps of `lax.scan`s.  A backward computes its part again from the saved input, or takes
what the forward saved, and differentiates that alone: autodiff never sees a scan over ticks, and only the table grows
with the number of microbatches.  Which slot of which buffer holds what arrives, and until when, is planned before.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax.parallel import collectives
from moejax.parallel.collectives import only_if
from moejax.parallel.schedules import Schedule
from moejax.parallel.split import Split


class Parts(NamedTuple):
    """What is run, for microbatch m and chunk c; both are traced numbers."""

    first: Callable[[Any, Array], Array]  # (shared weights, m) -> x
    middle: Callable[[Any, Array, Array, Array], Any]  # (chunk's weights, x, m, c) -> ((y, cost), figures)
    last: Callable[[Any, Array, Array], Any]  # (shared weights, y, m) -> cost, or in `forwards` anything to be summed
    fixed: dict[str, Array]  # weights of this stage that get no gradient; `middle` has them beside the chunk's


Times = dict[tuple[int, int], int]  # (microbatch, part) -> tick


class Plan(NamedTuple):
    """A schedule as numbers for the machine: columns [tick, stage], and how many slots each buffer needs."""

    columns: dict[str, np.ndarray]
    inputs: int  # of parts
    saved: int  # by F for B
    gradients: int  # from the next part
    owed: int  # by B to W


def lower(schedule: Schedule, train: bool = True, save: bool = False) -> Plan:
    """Slots for everything that waits.  In training without `save` the last part has no F: its B does it again."""
    ticks, stages, last = len(schedule.ticks), schedule.stages, schedule.stages * schedule.chunks - 1
    names = [f"{kind}_{what}" for kind in "fbw" for what in ("on", "m", "chunk", "slot", "first", "last")]
    names += ["f_save", "b_saved", "b_got", "b_owed", "get_x", "get_dy"]
    columns = {name: np.full((ticks, stages), -1 if name.startswith("get") else 0, np.int32) for name in names}
    for tick, stage, op in schedule.ops():
        kind, part = op.kind.lower(), op.chunk * stages + stage
        skipped = train and not save and kind == "f" and part == last
        values = {"on": not skipped, "m": op.microbatch, "chunk": op.chunk, "first": part == 0, "last": part == last}
        for what, value in values.items():
            columns[f"{kind}_{what}"][tick, stage] = value

    def allocate(begin: Times, end: Times, **fill: Times) -> int:
        """Gives what waits between ticks the lowest free slot, written down when `fill` tells; returns their number."""
        busy: list[list[int]] = [[] for _ in range(stages)]  # until when, by slot
        for which in sorted(begin, key=begin.get):
            stage = which[1] % stages
            mine, since = busy[stage], min(begin[which], end[which])
            slot = next((i for i, until in enumerate(mine) if until < since), len(mine))
            mine[slot:slot + 1] = [end[which]]
            for column, times in fill.items():
                if times.get(which, ticks) < ticks:  # a table without idle ticks is not causal
                    columns[column][times[which], stage] = slot
        return max(map(len, busy))

    forward, backward, weights = (
        {(m, part): tick for (k, m, part), tick in schedule.at.items() if k == kind} for kind in "FBW")
    arrives = {(m, part + 1): tick + 1 for (m, part), tick in forward.items() if part < last}
    returns = {(m, part - 1): tick + 1 for (m, part), tick in backward.items() if part}
    inputs = allocate(forward | arrives, backward if train and not save else forward, get_x=arrives, f_slot=forward,
                      b_slot=backward)
    saved = allocate(forward, backward, f_save=forward, b_saved=backward) if save else 0
    grads = allocate(returns, backward, get_dy=returns, b_got=backward)
    owed = allocate({which: backward[which] for which in weights}, weights, b_owed=backward, w_slot=weights)
    for column, size in (("get_x", inputs), ("get_dy", grads)):
        columns[column][columns[column] < 0] = size  # the slot after the last is for what nobody needs
    return Plan(columns, inputs, saved, grads, owed)


def here(plan: Plan) -> dict[str, Array]:
    """This stage's columns."""
    return {name: jnp.asarray(column)[:, collectives.index("pipeline")] for name, column in plan.columns.items()}


class Pull(NamedTuple):
    """The gradient of `middle` as a function of what its forward left: the same for every part and microbatch.  Where
    something is kept, an entry is the number of the weight that it is, or its type.
    """

    tree: Any  # of the function that jax.vjp returns
    cost: jax.ShapeDtypeStruct
    leaves: list[int | jax.ShapeDtypeStruct]
    split: Split | None  # into the gradient of the input and those of the weights
    owed: list[int | jax.ShapeDtypeStruct]  # what the split keeps

    @classmethod
    def trace(cls, parts: Parts, weights: Any, x: jax.ShapeDtypeStruct, cut: bool) -> "Pull":
        found = []

        def look(x: Array, number: Array) -> None:
            w, fixed = both = chunk((weights, parts.fixed), number)
            (y, cost), _, leaves, tree = differentiate(parts, w, fixed, x, number, number)
            dy, count = (y, cost), len(jax.tree.leaves(w))
            numbers = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(both))}
            kinds = jax.eval_shape(lambda: leaves)
            kinds = [numbers.get(id(leaf), kind) for leaf, kind in zip(leaves, kinds, strict=True)]
            split, owed = None, []
            if cut:
                pull = jax.make_jaxpr(lambda leaves, dy: jax.tree.unflatten(tree, leaves)(dy))(leaves, dy)
                split = Split(pull, [i == count for i in range(count + 1)])
                owed = jax.eval_shape(lambda: split.now(*leaves, *dy)[1])
                owed = [kind if i is None or i >= len(kinds) else kinds[i]
                        for i, kind in zip(split.kept_inputs, owed, strict=True)]
            found.append(cls(tree, jax.eval_shape(lambda: cost), kinds, split, owed))

        jax.eval_shape(look, x, pipeline_zero())
        return found[0]


def keep(values: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    """Those that are no weights."""
    return [value for value, kind in zip(values, kinds, strict=True) if not isinstance(kind, int)]


def complete(kept: Iterable[Array], kinds: Sequence[Any], both: Any) -> list[Array]:
    """The values of which `keep` left out the weights, moving and fixed."""
    kept, leaves = iter(kept), jax.tree.leaves(both)
    return [leaves[kind] if isinstance(kind, int) else next(kept) for kind in kinds]


def differentiate(parts: Parts, w: Any, fixed: Any, x: Array, m: Array, c: Array) -> tuple[Any, Any, list[Array], Any]:
    """(y, cost), figures, and the function that takes gradients back as its leaves and its tree."""
    out, pull, figures = jax.vjp(lambda w, x: parts.middle(w | fixed, x, m, c), w, x, has_aux=True)
    leaves, tree = jax.tree.flatten(pull)
    return out, figures, [jnp.asarray(leaf) for leaf in leaves], tree  # numbers known while tracing are leaves too


def gradients(schedule: Schedule, parts: Parts, weights: Any, shared: Any, save: bool) -> tuple[Any, Any, Array, Any]:
    """One device's part of the gradients of all costs of all microbatches.

    Args: weights: of this stage, every leaf [chunks, …]; shared: of `first` and `last`; save: F keeps what B needs;
        otherwise B computes its part again from the part's input.
    Returns: gradients of weights and of shared, in float32; the sum of the last parts' costs; the sums of the figures,
        [chunks, …].
    """
    plan = lower(schedule, save=save)
    rows = here(plan)
    x, kind = kinds(parts, weights, shared)
    pull = Pull.trace(parts, weights, x, schedule.split)
    saved = [kind[0][0], *keep(pull.leaves, pull.leaves)] if save else []
    carry = {
        "x": ring(x, plan.inputs), "y": collectives.zeros(x), "dy": ring(x, plan.gradients), "dx": collectives.zeros(x),
        "saved": ring(saved, plan.saved), "owed": ring(keep(pull.owed, pull.owed), plan.owed),
        "weights": zeros_like(weights), "shared": zeros_like(shared), "loss": jnp.zeros((), jnp.float32),
        "figures": ring(kind[1], schedule.chunks - 1)}

    def run_f(carry: Any, row: dict[str, Array]) -> dict[str, Any]:
        m, c = row["f_m"], row["f_chunk"]

        def run(x: Array) -> Any:
            w, fixed = chunk((weights, parts.fixed), c)
            if not save:
                return parts.middle(w | fixed, x, m, c)[0][0], None
            (y, _), figures, leaves, _ = differentiate(parts, w, fixed, x, m, c)
            return y, ([y, *keep(leaves, pull.leaves)], figures)

        xs, y, more = forward(parts, shared, carry["x"], row, x, run)
        if not save:
            return {"x": xs, "y": y}
        slot = jnp.where(row["f_on"] > 0, row["f_save"], plan.saved)
        return {"x": xs, "y": y, "saved": write(carry["saved"], more[0], slot),
                "figures": add_chunk(carry["figures"], c, more[1])}

    def run_b(carry: Any, row: dict[str, Array]) -> dict[str, Any]:
        m, c = row["b_m"], row["b_chunk"]
        sums = {name: carry[name] for name in ("weights", "shared", "loss", "figures")}
        slot = row["b_saved" if save else "b_slot"]

        def run(sums: Any) -> Any:
            w, fixed = both = chunk((weights, parts.fixed), c)
            if save:
                y, *leaves = (read_after(one, slot, carry["y"]) for one in carry["saved"])
                leaves, tree, new = complete(leaves, pull.leaves, both), pull.tree, sums["figures"]
            else:
                x = read_after(carry["x"], slot, carry["y"])
                (y, _), figures, leaves, tree = differentiate(parts, w, fixed, x, m, c)
                new = add_chunk(sums["figures"], c, figures)

            def head(sum_: Any, loss: Array) -> Any:
                cost, (more, dy) = jax.value_and_grad(parts.last, (0, 1))(shared, y, m)
                return dy, add(sum_, more), loss + cost

            def embedding(sum_: Any) -> Any:
                return add(sum_, jax.vjp(lambda shared: parts.first(shared, m), shared)[1](dx)[0])

            with jax.named_scope("last"):
                dy, new_shared, loss = only_if(row["b_last"] > 0, head, lambda *sums: (
                    read(carry["dy"], row["b_got"]), *sums[:2]), sums["shared"], sums["loss"])
            dy = (collectives.match(dy, y), collectives.cast(jnp.ones((), pull.cost.dtype), pull.cost))
            if pull.split:
                (dx,), owed = pull.split.now(*leaves, *dy)
                owed, new_weights = keep(owed, pull.owed), sums["weights"]
            else:
                more, dx = jax.tree.unflatten(tree, leaves)(dy)
                owed, new_weights = [], add_chunk(sums["weights"], c, more)
            new_shared = only_if(row["b_first"] > 0, embedding, lambda sum_, _: sum_, new_shared)
            return (dx, owed), {"weights": new_weights, "shared": new_shared, "loss": loss, "figures": new}

        (dx, owed), sums = only_if(row["b_on"] > 0, run, lambda sums, kind: (collectives.zeros(kind[0]), sums), sums)
        slot = jnp.where(row["b_on"] > 0, row["b_owed"], plan.owed)
        return {"dx": dx, "owed": write(carry["owed"], owed, slot)} | sums

    def run_w(carry: Any, row: dict[str, Array]) -> dict[str, Any]:
        slot, c = row["w_slot"], row["w_chunk"]

        def run(sums: Any) -> Any:
            kept = (read_after(one, slot, carry["dx"]) for one in carry["owed"])
            more = pull.split.later(complete(kept, pull.owed, chunk((weights, parts.fixed), c)))
            return add_chunk(sums, c, jax.tree.unflatten(jax.tree.structure(weights), more))

        return {"weights": only_if(row["w_on"] > 0, run, lambda sums, _: sums, carry["weights"])}

    def make(does: set[str]) -> Callable[[Any, Any], Any]:
        def tick(carry: Any, row: dict[str, Array]) -> tuple[Any, None]:
            carry = carry | {"x": write(carry["x"], carry["y"], row["get_x"])}
            if "B" in does:
                carry |= {"dy": write(carry["dy"], carry["dx"], row["get_dy"])}
            for op, run in (("F", run_f), ("B", run_b), ("W", run_w)):
                if op in does:
                    with jax.named_scope(op):
                        carry |= run(carry, row)
            if "F" in does:
                # Of the weights' gradients one that varies over no more axes than y does.
                least = min(jax.tree.leaves(carry["weights"]), key=lambda one: len(collectives.varying(one)))
                carry["y"] = collectives.pass_on(collectives.after(carry["y"], carry["dx"], least), 1)
            if "B" in does:
                carry["dx"] = collectives.pass_on(collectives.after(carry["dx"], carry["y"]), -1)
            return carry, None

        return tick

    full = make({"F", "B", "W"} if schedule.split else {"F", "B"})
    carry = collectives.cast(carry, jax.eval_shape(full, carry, jax.tree.map(lambda column: column[0], rows))[0])
    for begin, end, does in phases(schedule):
        carry, _ = lax.scan(make(does), carry, {name: column[begin:end] for name, column in rows.items()})
    return carry["weights"], carry["shared"], carry["loss"], carry["figures"]


def forwards(schedule: Schedule, parts: Parts, weights: Any, shared: Any) -> tuple[Any, Any]:
    """Only forward: the sum of what `last` gives, and the figures of every microbatch, [chunks, microbatches, …]."""
    plan = lower(schedule, train=False)
    rows = here(plan)
    x, _ = kinds(parts, weights, shared)

    def tick(carry: Any, row: dict[str, Array]) -> tuple[Any, Any]:
        xs, y, result = carry
        m, c = row["f_m"], row["f_chunk"]

        def run(x: Array) -> Any:
            (y, _), figures = parts.middle(chunk(weights | parts.fixed, c), x, m, c)
            return y, figures

        xs, y, figures = forward(parts, shared, write(xs, y, row["get_x"]), row, x, run)
        result = only_if(row["f_on"] * row["f_last"] > 0, lambda result: add(result, parts.last(shared, y, m)),
                         lambda result, _: result, result)
        return (xs, collectives.pass_on(collectives.after(y, result), 1), result), figures

    result = collectives.zeros(jax.eval_shape(parts.last, shared, x, pipeline_zero()))
    carry = (ring(x, plan.inputs), collectives.zeros(x), result)
    carry = collectives.cast(carry, jax.eval_shape(tick, carry, jax.tree.map(lambda column: column[0], rows))[0])
    (_, _, result), figures = lax.scan(tick, carry, rows)
    when = np.array([[[schedule.at["F", m, c * schedule.stages + s] for m in range(schedule.microbatches)]
                      for c in range(schedule.chunks)] for s in range(schedule.stages)])
    when = jnp.asarray(when)[collectives.index("pipeline")]
    return result, jax.tree.map(lambda found: found[when], figures)


def forward(parts: Parts, shared: Any, xs: Array, row: dict[str, Array], kind: Any, run: Callable[[Array], Any]) -> Any:
    """One F, if there is one: the inputs with this one, and what `run` makes of it."""
    slot, on = row["f_slot"], row["f_on"] > 0
    x = only_if(on & (row["f_first"] > 0), lambda xs: parts.first(shared, row["f_m"]), lambda xs, _: read(xs, slot), xs)
    x = collectives.match(collectives.cast(x, kind), xs)
    xs = write(xs, x, jnp.where(on, slot, xs.shape[0] - 1))
    return xs, *only_if(on, run, lambda x, kind: collectives.zeros(kind), x)


def phases(schedule: Schedule) -> list[tuple[int, int, set[str]]]:
    """(first tick, end, kinds of ops) of warm-up, steady state and drain: no tick pays for what none of it does."""
    busy = [{op.kind for cell in row for op in cell} for row in schedule.ticks]
    steady = next((i for i, kinds in enumerate(busy) if kinds - {"F"}), len(busy))
    drain = max((i for i, kinds in enumerate(busy) if "F" in kinds), default=-1) + 1
    cuts = sorted({0, steady, max(steady, drain), len(busy)})
    return [(a, b, set().union(*busy[a:b])) for a, b in itertools.pairwise(cuts)]


def kinds(parts: Parts, weights: Any, shared: Any) -> tuple[Any, Any]:
    """Types of an activation between parts, and of what `middle` returns: (y, cost), figures."""
    zero = pipeline_zero()
    x = jax.eval_shape(parts.first, shared, zero)
    for _ in range(2):  # x varies over as much as y does
        found = jax.eval_shape(lambda x: parts.middle(chunk(weights | parts.fixed, zero), x, zero, zero), x)
        x = found[0][0]
    return x, found


def pipeline_zero() -> Array:
    """A number that differs between stages, as far as types know."""
    return collectives.vary(jnp.zeros((), jnp.int32), ("pipeline",))


def ring(kinds: Any, slots: int) -> Any:
    """Zeros for so many of each, and one more for what nobody needs."""
    return jax.tree.map(lambda zero: collectives.match(jnp.zeros((slots + 1, *zero.shape), zero.dtype), zero),
                        collectives.zeros(kinds))


def read(buffer: Array, slot: Array | int) -> Array:
    return lax.dynamic_index_in_dim(buffer, slot, 0, keepdims=False)


def read_after(buffer: Array, slot: Array, other: Array) -> Array:
    """Not before `other` is there (see collectives.after), unless the type of what is read is too narrow for that.  A
    branch of a condition begins when all that it reads is there, so that one such read is enough.
    """
    last = collectives.after(slot, other)
    return read(buffer, last if collectives.varying(last) <= collectives.varying(buffer) else slot)


def write(buffers: Any, values: Any, slot: Array) -> Any:
    def one(buffer: Array, x: Array) -> Array:
        return lax.dynamic_update_index_in_dim(*collectives.match((buffer, x, slot), buffer, x, slot), 0)

    return jax.tree.map(one, buffers, values)


def chunk(weights: Any, c: Array | int) -> Any:
    return jax.tree.map(lambda w: w[0] if w.shape[0] == 1 else read(w, c), weights)


def add(sums: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def add_chunk(sums: Any, c: Array, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b[None] if a.shape[0] == 1 else a.at[c].add(b), sums, more)


def zeros_like(weights: Any) -> Any:
    return jax.tree.map(lambda w: collectives.match(jnp.zeros(w.shape, jnp.float32), w), weights)

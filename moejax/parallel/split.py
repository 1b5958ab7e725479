"""A traced function cut in two: what some of its results need now, and the rest for later.

Used to take the gradients of a part's weights apart from that of its input.  A scan (over layers) is cut inside: what
its carry needs runs now and stacks what the rest will use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.api_util import debug_info
from jax.extend import core

Key = Any  # a variable of the traced function, or an object that stands for a value added here


class Step(NamedTuple):
    inputs: list[Key]
    outputs: list[Key]
    run: Callable[..., Sequence[Array]]


class Split:
    """now(inputs) -> (the wanted results, kept values); later(kept) -> the other results.  `kept_inputs` gives for each
    kept value the number of the input that it is, or None.
    """

    def __init__(self, function: core.ClosedJaxpr, wanted: Sequence[bool]):
        jaxpr = function.jaxpr
        self.inputs, self.consts = list(jaxpr.invars), dict(zip(jaxpr.constvars, function.consts, strict=True))
        self.first, self.rest = parted(jaxpr.outvars, wanted)
        self.early, self.late, self.kept = cut(jaxpr, self.first, self.rest)
        self.kept_inputs = [self.inputs.index(key) if key in self.inputs else None for key in self.kept]

    def now(self, *inputs: Array) -> tuple[list[Array], list[Array]]:
        values = follow(self.early, self.consts | dict(zip(self.inputs, inputs, strict=True)))
        return [value_of(out, values) for out in self.first], [values[key] for key in self.kept]

    def later(self, kept: Sequence[Array]) -> list[Array]:
        values = follow(self.late, dict(zip(self.kept, kept, strict=True)))
        return [value_of(out, values) for out in self.rest]


def cut(jaxpr: core.Jaxpr, first: Sequence[Key], rest: Sequence[Key]) -> tuple[list[Step], list[Step], list[Key]]:
    """Steps that `first` needs, steps that only `rest` needs, and the values that the latter use of the former."""
    needed, used = set(variables(first)), set(variables(rest))
    early: list[Step] = []
    late: list[Step] = []
    for eqn in reversed(jaxpr.eqns):
        now = [out in needed for out in eqn.outvars]
        if not any(now):
            late.append(step(eqn))
        elif eqn.primitive.name == "scan" and not all(now):
            a, b = cut_scan(eqn, now)
            early.append(a)
            late.append(b)
            needed.update(variables(a.inputs))
        else:
            early.append(step(eqn))
            needed.update(variables(eqn.invars))
    early.reverse()
    late = [used.update(variables(one.inputs)) or one
            for one in late if used & set(one.outputs)]  # from the last to the first, so nothing idle remains
    late.reverse()
    made = {key for one in late for key in one.outputs}
    known = [*jaxpr.constvars, *jaxpr.invars, *(key for one in early for key in one.outputs)]
    return early, late, [key for key in dict.fromkeys(known) if key in used and key not in made]


def parted(values: Sequence[Any], now: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Those that are wanted now, and the others."""
    both = list(zip(values, now, strict=True))
    return [value for value, here in both if here], [value for value, here in both if not here]


def variables(keys: Sequence[Key]) -> list[Key]:
    """Each once, without what is known while tracing."""
    return list(dict.fromkeys(key for key in keys if not isinstance(key, core.Literal)))


def step(eqn: core.JaxprEqn) -> Step:
    inputs = variables(eqn.invars)
    about = debug_info("step", lambda *inputs: None, inputs, {}).with_unknown_names()
    alone = core.ClosedJaxpr(core.Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects, about), ())
    return Step(inputs, list(eqn.outvars), core.jaxpr_as_fun(alone))


def cut_scan(eqn: core.JaxprEqn, now: Sequence[bool]) -> tuple[Step, Step]:
    body, length, reverse = eqn.params["jaxpr"], eqn.params["length"], eqn.params["reverse"]
    # Inputs are constants, carry and slices; results carry and slices.  Slices have one dimension more outside.
    carries = sum(out.aval.ndim == inner.aval.ndim for out, inner in zip(eqn.outvars, body.jaxpr.outvars, strict=True))
    slices = sum(one.aval.ndim != inner.aval.ndim for one, inner in zip(eqn.invars, body.jaxpr.invars, strict=True))
    fixed = len(eqn.invars) - carries - slices
    now = [True] * carries + list(now[carries:])  # the carry always runs on
    first, rest = parted(body.jaxpr.outvars, now)
    early, late, kept = cut(body.jaxpr, first, rest)
    inner = body.jaxpr.invars
    outer = dict(zip(inner, eqn.invars, strict=True))
    stay = [key for key in kept if key in inner[:fixed]]
    sliced = [key for key in kept if key in inner[fixed + carries:]]
    new = [key for key in kept if key not in stay and key not in sliced]  # made, or carried: stacked for later
    stacks = [object() for _ in new]
    consts = dict(zip(body.jaxpr.constvars, body.consts, strict=True))

    def run_now(*values: Array) -> list[Array]:
        given = dict(zip(inputs, values, strict=True))
        given = [value_of(key, given) for key in eqn.invars]

        def one(carry: Any, slice_: Any) -> Any:
            values = follow(early, consts | dict(zip(inner, [*given[:fixed], *carry, *slice_], strict=True)))
            found = [value_of(out, values) for out in first]
            return found[:carries], (found[carries:], [values[key] for key in new])

        carry, (ys, more) = lax.scan(one, given[fixed:fixed + carries], given[fixed + carries:], length, reverse)
        return [*carry, *ys, *more]

    def run_later(*values: Array) -> list[Array]:
        fixed_values, slices = values[:len(stay)], list(values[len(stay):])

        def one(carry: None, slice_: Any) -> Any:
            values = follow(late, consts | dict(zip([*stay, *sliced, *new], [*fixed_values, *slice_], strict=True)))
            return None, [value_of(out, values) for out in rest]

        return lax.scan(one, None, slices, length, reverse)[1]

    inputs, (outputs, others) = variables(eqn.invars), parted(eqn.outvars, now)
    return (Step(inputs, [*outputs, *stacks], run_now),
            Step([*(outer[key] for key in [*stay, *sliced]), *stacks], others, run_later))


def follow(steps: Sequence[Step], values: dict[Key, Array]) -> dict[Key, Array]:
    for one in steps:
        values.update(zip(one.outputs, one.run(*(value_of(key, values) for key in one.inputs)), strict=True))
    return values


def value_of(key: Key, values: dict[Key, Array]) -> Any:
    return jnp.asarray(key.val) if isinstance(key, core.Literal) else values[key]

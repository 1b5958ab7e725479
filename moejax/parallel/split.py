"""A traced function cut in two: what some results (the gradient of an input) need now, and the rest (gradients of
weights) for later.  A scan (over layers) is cut inside: its carry runs now and stacks what the rest will use.
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
    """now(inputs) -> (wanted results, kept values); later(kept) -> the others.  `kept_inputs` tells which inputs."""

    def __init__(self, function: core.ClosedJaxpr, wanted: Sequence[bool]):
        jaxpr = function.jaxpr
        self.inputs, self.consts = list(jaxpr.invars), dict(zip(jaxpr.constvars, function.consts, strict=True))
        self.first, self.rest = parted(jaxpr.outvars, wanted)
        self.early, self.late, self.kept = cut(jaxpr, self.first, self.rest)
        self.kept_inputs = [self.inputs.index(key) if key in self.inputs else None for key in self.kept]

    def now(self, *inputs: Array) -> tuple[list[Array], list[Array]]:
        values = self.consts | dict(zip(self.inputs, inputs, strict=True))
        found = follow(self.early, values, [*self.first, *self.kept])
        return found[:len(self.first)], found[len(self.first):]

    def later(self, kept: Sequence[Array]) -> list[Array]:
        return follow(self.late, dict(zip(self.kept, kept, strict=True)), self.rest)


def cut(jaxpr: core.Jaxpr, first: Sequence[Key], rest: Sequence[Key]) -> tuple[list[Step], list[Step], list[Key]]:
    """Steps that `first` needs, steps that only `rest` needs, and the values that the latter use of the former."""
    needed, used = set(variables(first)), set(variables(rest))
    early, late = [], []
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
        given = follow([], dict(zip(inputs, values, strict=True)), eqn.invars)

        def one(carry: Any, slice_: Any) -> Any:
            values = consts | dict(zip(inner, [*given[:fixed], *carry, *slice_], strict=True))
            found = follow(early, values, [*first, *new])
            return found[:carries], found[carries:]

        carry, ys = lax.scan(one, given[fixed:fixed + carries], given[fixed + carries:], length, reverse)
        return [*carry, *ys]

    def run_later(*values: Array) -> list[Array]:
        fixed_values, slices = values[:len(stay)], list(values[len(stay):])

        def one(carry: None, slice_: Any) -> Any:
            values = consts | dict(zip([*stay, *sliced, *new], [*fixed_values, *slice_], strict=True))
            return None, follow(late, values, rest)

        return lax.scan(one, None, slices, length, reverse)[1]

    inputs, (outputs, others) = variables(eqn.invars), parted(eqn.outvars, now)
    return (Step(inputs, [*outputs, *stacks], run_now),
            Step([*(outer[key] for key in [*stay, *sliced]), *stacks], others, run_later))


def follow(steps: Sequence[Step], values: dict[Key, Array], wanted: Sequence[Key]) -> list[Array]:
    for one in steps:
        values.update(zip(one.outputs, one.run(*(values[key] for key in one.inputs)), strict=True))
    return [jnp.asarray(key.val) if isinstance(key, core.Literal) else values[key] for key in wanted]

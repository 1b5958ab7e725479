"""Counts of the program that trains, traced on a mesh of any size: nothing runs, nothing is compiled.

`trace` walks the jaxpr of the real step as one device does it: matmul FLOPs, bytes sent by mesh axis, and the memory of
what is alive at the worst moment.  Of a condition the dearest branch counts, as the ticks of a pipeline last as long
as their busiest stage.  Memory follows what compilers do: elementwise work is fused into what reads it, and what
is carried through a loop, updated or summed over devices is done in place.
"""

import functools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from moejax.config import AXES, Config
from moejax.data.batch import Batch, Images
from moejax.model.sharded import Sharded
from moejax.parallel.axes import rows
from moejax.train import state as states
from moejax.train.optimizer import make_optimizer
from moejax.train.step import make_step

# What a device sends of x bytes that it holds before, to n devices, as rings do it.
SENT = {"all_reduce": lambda x, n: 2 * x * (n - 1) / n, "reduce_scatter": lambda x, n: x * (n - 1) / n,
        "all_gather": lambda x, n: x * (n - 1), "all_to_all": lambda x, n: x * (n - 1) / n, "permute": lambda x, n: x}
VERBS = {"psum": "all_reduce", "psum_invariant": "all_reduce", "pmax": "all_reduce", "ppermute": "permute",
         "all_gather": "all_gather", "all_gather_invariant": "all_gather", "reduce_scatter": "reduce_scatter",
         "all_to_all": "all_to_all"}
LOOPS = ("scan", "while", "cond")
# Results that are in memory, whoever reads them; those of other operations only where one of these reads them.
STORED = {"dot_general", "gather", "scatter", "scatter-add", "sort", "cumsum", "top_k", "dynamic_update_slice",
          "concatenate", "random_bits", "argmax", *LOOPS, *VERBS}
SAME = {"reshape", "broadcast_in_dim", "squeeze", "pvary", "copy", "name", "stop_gradient", "convert_element_type",
        "transpose", "slice", "rev", "iota"}  # a view, or fused into every reader
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "psum", "psum_invariant", "pmax"}


class Count(NamedTuple):
    dots: Counter  # (FLOPs, bytes read and written) of a matmul -> how often
    sent: Counter  # axes, such as "tensor" or "data+fsdp" -> bytes
    peak: int  # bytes
    arguments: int  # bytes


def flops_of(dots: Counter) -> float:
    return sum(flops * times for (flops, _), times in dots.items())


class Equation(NamedTuple):
    name: str
    params: dict[str, Any]
    reads: list[Any]  # variables, literals left out
    makes: list[Any]
    kinds: list[Any]  # avals of `makes`
    local: bool  # inside the one-device program


def make_program(config: Config, mesh: Mesh | AbstractMesh | None = None) -> tuple[Sharded, Any, tuple[Any, Batch]]:
    """A config's model, its step and the step's arguments as shapes with shardings; the mesh is abstract by default."""
    mesh = mesh or AbstractMesh(tuple(config.mesh.lengths().values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    sharded = Sharded(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, states.trained(sharded, sharded.axes))
    place, seen = NamedSharding(mesh, rows(mesh.shape)), config.data.images

    def kind(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch, *shape), dtype, sharding=place)

    tokens, images = config.data.sequence, None
    if seen:
        size, frames = config.model.encoder().size, config.model.looks().frames
        images = Images(kind(jnp.uint8, seen, frames, size, size, 3), kind(jnp.int32, seen),
                        kind(jnp.bool_, tokens, seen))
    batch = Batch(kind(jnp.int32, tokens), kind(jnp.int32, tokens), kind(jnp.float32, tokens), kind(jnp.int32), images)
    return sharded, make_step(sharded, optimizer), (states.abstract(sharded, optimizer), batch)


def trace(config: Config) -> Count:
    """What one device does in one training step."""
    sharded, step, args = make_program(config)
    jaxpr = jax.make_jaxpr(step)(*args).jaxpr
    jaxpr, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    arguments = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
                    for leaf, needed in zip(jax.tree.leaves(args), used, strict=True) if needed)
    dots, sent = amounts(jaxpr, dict(sharded.mesh.shape.items()))
    if config.mesh.zero1 and config.mesh.data > 1:  # new weights go to all who use them: outside the one-device program
        for name, spec in states.trained(sharded, states.optimizer_specs(sharded)).items():
            if spec != sharded.specs[name]:
                sent["data"] += SENT["all_gather"](shard_bytes(sharded, name, spec), config.mesh.data)
    return Count(dots, sent, peak(jaxpr, 0), arguments)


def shard_bytes(sharded: Sharded, name: str, spec: Any, itemsize: int = 4) -> float:
    """Of this device's part of a weight placed so."""
    return itemsize * math.prod(sharded.shapes[name]) / math.prod(
        sharded.mesh.shape[axis] for axis in spec if axis is not None)


def inside(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, (core.Jaxpr, core.ClosedJaxpr)):
                yield getattr(each, "jaxpr", each)


def amounts(jaxpr: core.Jaxpr, sizes: dict[str, int]) -> tuple[Counter, Counter]:
    """Matmuls and bytes sent, loops as often as they run."""
    dots, sent = Counter(), Counter()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            each = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            flops = 2 * math.prod(each[2].shape) * math.prod(each[0].shape[dim] for dim in contracted)
            dots[flops, sum(map(nbytes, each))] += 1
        elif name in VERBS:
            named = params.get("axes", params.get("axis_name"))
            axes = tuple(axis for axis in ([named] if isinstance(named, str) else named) if sizes[axis] > 1)
            size = sum(nbytes(v.aval) for v in eqn.invars)
            sent["+".join(axes)] += SENT[VERBS[name]](size, math.prod(sizes[axis] for axis in axes))
        parts = [amounts(each, sizes) for each in inside(params)]
        if name == "cond":
            dearest = max((some for some, _ in parts), key=flops_of)
            parts = [(dearest, functools.reduce(operator.or_, (moves for _, moves in parts)))]
        times = params["length"] if name == "scan" else 1
        for part in parts:
            for total, found in zip((dots, sent), part, strict=True):
                total.update({key: value * times for key, value in found.items()})
    del sent[""]  # over axes of length 1
    return dots, sent


def nbytes(kind: Any) -> int:
    return kind.size * kind.dtype.itemsize


def flat(jaxpr: core.Jaxpr, local: bool) -> tuple[list[Equation], list[Any]]:
    """The equations of a jaxpr with what it calls put in its place, and its results; loops stay as they are."""
    found: list[Equation] = []

    def go(jaxpr: core.Jaxpr, known: dict[Any, Any], local: bool) -> list[Any]:
        def get(v: Any) -> Any:
            return None if isinstance(v, core.Literal) else known.get(v, v)

        for eqn in jaxpr.eqns:
            name, reads = eqn.primitive.name, [get(v) for v in eqn.invars]
            once = name == "scan" and eqn.params["length"] == 1  # no loop, for a compiler
            called = list(inside(eqn.params)) if once or name not in LOOPS else []
            if called:
                makes = go(called[0], dict(zip(called[0].invars, reads, strict=False)), local or name == "shard_map")
            else:
                makes, kinds = [object() for _ in eqn.outvars], [v.aval for v in eqn.outvars]
                params = eqn.params | carried(eqn) if name == "scan" else eqn.params
                found.append(Equation(name, params, reads, makes, kinds, local))
            known.update(zip(eqn.outvars, makes, strict=True))
        return [get(v) for v in jaxpr.outvars]

    return found, go(jaxpr, {}, local)


def carried(eqn: Any) -> dict[str, int]:
    """How many inputs of a scan are constant, and how many it carries: what it scans has one more dimension outside."""
    body = next(inside(eqn.params))
    carry, stacked = (sum((a.aval.ndim == b.aval.ndim) is same for a, b in zip(outer, inner, strict=True))
                      for outer, inner, same in ((eqn.outvars, body.outvars, True), (eqn.invars, body.invars, False)))
    return {"num_consts": len(eqn.invars) - stacked - carry, "num_carry": carry}


def peak(jaxpr: core.Jaxpr, depth: int) -> int:
    """Bytes at the worst moment of what is made inside; the whole step's results are written over its arguments."""
    equations, results = flat(jaxpr, depth > 0)
    readers = defaultdict(list)
    for at, eqn in enumerate(equations):
        for v in eqn.reads:
            readers[v].append(at)
    for v in results:
        readers[v].append(len(equations))

    @functools.cache
    def stored(v: Any) -> bool:
        """Whether some reader needs it in memory."""
        return any(at == len(equations) or equations[at].name in STORED or (
            equations[at].name in SAME and any(map(stored, equations[at].makes))) for at in readers[v])

    homes: dict[Any, frozenset] = defaultdict(frozenset)  # variable -> what is in memory of which it is made
    tenants: dict[Any, list[Any]] = defaultdict(list)  # the other way round
    size, first = {}, {}  # of what is in memory: bytes, the equation that makes it
    for at, eqn in enumerate(equations):
        sources = frozenset().union(*(homes[v] for v in eqn.reads if v is not None))
        for number, (v, kind) in enumerate(zip(eqn.makes, eqn.kinds, strict=True)):
            whole = eqn.name in STORED or (eqn.name not in SAME and stored(v))
            if not (whole and eqn.local) or (depth == 0 and len(equations) in readers[v]):
                homes[v] = sources
            else:
                over = overwritten(eqn, number, homes)
                fits = over is not None and size[over] >= nbytes(kind)
                home = over if fits and all(max(readers[w], default=0) <= at for w in tenants[over]) else v
                homes[v] = frozenset([home])
                size.setdefault(home, nbytes(kind))
                first.setdefault(home, at)
            for home in homes[v]:
                tenants[home].append(v)
    change = [0] * (len(equations) + 2)  # of the bytes in memory, before each equation
    for home, begin in first.items():
        change[begin] += size[home]
        change[max(max(readers[v], default=begin) for v in tenants[home]) + 1] -= size[home]
    best = alive = 0
    for at, eqn in enumerate(equations):
        alive += change[at]
        within = [peak(each, depth + 1) - sum(nbytes(v.aval) for v in reused(each, eqn)) for each in inside(eqn.params)]
        best = max(best, alive + max(within, default=0))
    return best


def overwritten(eqn: Equation, number: int, homes: dict[Any, frozenset]) -> Any:
    """What result `number` of an equation can be written over, if nobody reads that later."""
    if eqn.name == "scan" and number < eqn.params["num_carry"]:
        source = eqn.reads[eqn.params["num_consts"] + number]
    elif eqn.name in IN_PLACE:
        source = eqn.reads[number if eqn.name in VERBS else 0]
    else:
        return None
    return next(iter(homes[source])) if source is not None and len(homes[source]) == 1 else None


def reused(body: core.Jaxpr, eqn: Equation) -> list[Any]:
    """Results of a loop's body or of a branch that lie where its own do; in loops, none of a condition's are."""
    fresh = {id(v) for each in body.eqns if each.primitive.name == "cond" for v in each.outvars}
    results = body.outvars[:eqn.params.get("num_carry")]
    return results if eqn.name == "cond" else [v for v in results if id(v) not in fresh]

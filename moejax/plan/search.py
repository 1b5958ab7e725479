"""The fastest layout of a config on so many devices: every mesh, schedule, microbatching and remat policy that fits.

A layout is judged by arithmetic alone, on what two small traces of the config count per token and layer; `moejax plan`
counts the winner exactly.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from typing import Any, NamedTuple

from moejax.config import AXES, Config, ConfigError, Mesh, check, divisors
from moejax.model.sharded import Sharded
from moejax.parallel import hardware, schedules
from moejax.parallel.axes import BATCH, RULES, names
from moejax.parallel.hardware import Device
from moejax.plan import budget
from moejax.plan.cost import speed
from moejax.plan.count import Count, flops_of, make_program, trace
from moejax.train.state import trained

ROOM = 0.92  # of a device's memory: the rest is the runtime's


class Layout(NamedTuple):
    step_seconds: float
    memory_bytes: float
    mfu: float
    bubble: float
    mesh: Mesh
    microbatches: int
    remat: str


def search(config: Config, on: str, top: int = 10) -> dict[str, Any]:
    """The layouts that fit, fastest first, and why the others were refused.

    Returns: {"layouts": [{"overrides", "step_seconds", "mfu", "memory_bytes", "bubble"}], "tried", "fit", "seconds",
        "refused": {reason: how many}}.
    Raises ConfigError: no such device, or no layout fits.
    """
    begin = time.perf_counter()
    device, count = hardware.named(on, config.hardware, config.mesh.devices())
    judge, refused, found, tried = Judge(config, device, count), Counter(), [], 0
    for mesh in meshes(config, count):
        group = mesh.pipeline if mesh.schedule == "interleaved" else 1  # microbatches come in multiples of it
        case = replace(config, mesh=mesh, train=replace(config.train, microbatches=group))
        if problems := check(case):
            refused.update({problem.split(";")[0] for problem in problems})
            tried += 1
            continue
        for groups in divisors(config.data.batch // (mesh.batch_shards() * group)):
            if mesh.pipeline == 1 and groups > 64:
                break
            for remat in judge.flops:
                one = judge(mesh, groups * group, remat)
                tried += 1
                if one.memory_bytes > ROOM * device.memory:
                    refused[f"needs more than {ROOM:.0%} of {device.memory / 1e9:.0f} GB"] += 1
                else:
                    found.append(one)
    if not found:
        raise ConfigError([f"no layout of {count} × {device.name} fits; {times} × {why}"
                           for why, times in refused.most_common(5)])
    found.sort(key=lambda one: (one.step_seconds, one.memory_bytes))
    layouts = [{"overrides": overrides(config.mesh, one), "step_seconds": one.step_seconds, "mfu": one.mfu,
                "memory_bytes": one.memory_bytes, "bubble": one.bubble} for one in found[:top]]
    return {"layouts": layouts, "tried": tried, "fit": len(found), "refused": dict(refused.most_common()),
            "device": device.name, "devices": count, "seconds": time.perf_counter() - begin}


def overrides(mine: Mesh, layout: Layout) -> list[str]:
    """What makes a config with the mesh `mine` one of this layout."""
    before, usual = asdict(mine), asdict(Mesh())
    changed = [f"mesh.{name}={str(value).lower()}" for name, value in asdict(layout.mesh).items()
               if not value == before[name] == usual[name]]
    return [*changed, f"train.microbatches={layout.microbatches}", f"train.remat={layout.remat}"]


def meshes(config: Config, count: int) -> Iterator[Mesh]:
    """Every way to share out the devices, with the schedules that a pipeline can have."""
    for lengths in products(count, len(AXES)):
        data, tensor = lengths[0], lengths[-1]
        mesh = Mesh(*lengths, zero1=data > 1, sequence=tensor > 1 and config.data.sequence % tensor == 0)
        yield mesh
        if mesh.pipeline > 1:
            yield replace(mesh, schedule="zero_bubble")
            yield from (replace(mesh, schedule="interleaved", chunks=chunks) for chunks in (2, 4)
                        if mesh.pipeline * chunks <= config.model.layers)


def products(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (count,)
        return
    for first in divisors(count):
        for rest in products(count // first, parts - 1):
            yield (first, *rest)


@cache
def idle(schedule: str, stages: int, chunks: int) -> float:
    """Idle time of a stage, in forwards and backwards of a microbatch: counted of 8 stages at most, then scaled."""
    some = min(stages, 8)
    table = schedules.SCHEDULES[schedule](some, 2 * some, chunks)
    return 2 * some * table.bubble() / (1 - table.bubble()) * (stages - 1) / max(some - 1, 1)


class Judge:
    """Predicts layouts of one config on devices of one kind."""

    def __init__(self, config: Config, device: Device, count: int):
        self.config, self.device, self.count = config, device, count
        alone, model, tokens = budget.alone(config), config.model, config.data.sequence
        sharded, _, (state, _) = make_program(alone)
        self.kinds = kinds(sharded)
        self.bytes = 2 if config.train.compute == "bfloat16" else 4
        self.moments = budget.memory_of(sharded, state)["optimizer_bytes_per_device"] / sum(
            size for size, _ in self.kinds.values())
        # Of what a token leaves in a layer for the backward pass, `split` is shared out over `tensor`.
        halves = [Mesh(tensor=some, sequence=tokens % some == 0) for some in divisors(model.heads)[1:]]
        half = next((mesh for mesh in halves if not check(replace(alone, mesh=mesh))), None)
        self.left = {}  # the rest, and that: where all but weights waits in a pipeline's buffers, and elsewhere
        for piped, remat in ((True, "weights"), (False, "none")):
            told = replace(alone, train=replace(alone.train, remat=remat))
            counted, kept = self.kept(told)
            less = (kept - self.kept(replace(told, mesh=half))[1]) / (1 - 1 / half.tensor) if half else 0.0
            self.left[piped] = kept - less, less
        flops, head = flops_of(counted.dots), 2 * model.vocab * model.d_model * tokens
        self.flops = {"none": flops * config.data.batch, "full": (flops * 4 / 3 - head) * config.data.batch}
        self.useful = 3 * sharded.flops_per_token() * config.data.batch * tokens
        self.moes = model.layer_kinds().count("M") / max(model.layers, 1)
        self.of_weights = cache(self.of_weights)

    def kept(self, config: Config) -> tuple[Count, float]:
        """The counted step, and how many bytes a token leaves in a layer, beside weights and gradients."""
        counted, (sharded, _, (state, _)) = trace(config), make_program(config)
        gradients = budget.memory_of(sharded, state)["gradients_bytes_per_device"]
        rounded = gradients / 2 if self.bytes == 2 else 0.0
        return counted, max(counted.peak - gradients - rounded, 0) / (config.data.sequence * config.model.layers)

    def of_weights(self, mesh: Mesh) -> tuple[float, float, float, float]:
        """Bytes of a device: weights and moments, gradients, weights in the compute type, and what it sends."""
        lengths = mesh.lengths()
        state = gradients = used = swapped = 0.0
        for where, (size, moving) in self.kinds.items():
            mine = size / math.prod(lengths[axis] for axis in where)
            shares = math.prod(lengths[axis] for axis in BATCH if axis not in where)
            state += mine * (4 + self.moments * moving / (mesh.data if mesh.zero1 else 1))
            gradients += mine * 4 * moving
            used += mine * self.bytes * (mesh.fsdp if "fsdp" in where else 1)
            swapped += 2 * (shares - 1) / shares * mine * 4 * moving
        return state, gradients, used, swapped

    def __call__(self, mesh: Mesh, microbatches: int, remat: str) -> Layout:
        model, moe, data, device = self.config.model, self.config.model.moe, self.config.data, self.device
        state, gradients, used, swapped = self.of_weights(mesh)
        tokens = data.batch * data.sequence / (mesh.batch_shards() * microbatches)  # of a microbatch on a device
        layer = tokens * model.d_model * self.bytes
        row = layer / (mesh.tensor if mesh.sequence else 1)
        layers = math.ceil(model.layers / mesh.parts())  # of a part, at most
        whole, split = self.left[mesh.pipeline > 1 and remat == "none"]
        work = tokens * (whole + split / mesh.tensor)  # of a layer, all saved
        part = layers * work + used / mesh.chunks * (self.bytes == 2 or mesh.fsdp > 1)  # float32 weights are no copies
        if mesh.pipeline > 1:
            waiting = min(2 * mesh.parts() - 1, microbatches * mesh.chunks)
            kept = part * (waiting + 2) if remat == "none" else row * waiting + part + work
            kept += gradients / mesh.chunks  # those of a tick, beside their sum
            if mesh.schedule == "zero_bubble":  # what weight gradients wait for: what goes into matmuls, and out again
                kept += mesh.pipeline * layers * tokens * (whole + split / 3 / mesh.tensor)
        else:
            kept = part if remat == "none" else row * layers + part / layers
        # Seconds
        peak = device.flops(self.config.train.compute)
        bubble = idle(mesh.schedule, mesh.pipeline, mesh.chunks) if mesh.pipeline > 1 else 0.0
        busy = self.flops[remat] / (self.count * peak) * layers * mesh.parts() / model.layers
        passes = (4 if remat == "none" else 6) * microbatches * model.layers / mesh.pipeline
        seats = moe.active * (moe.capacity_factor or 1.0)
        talk = {"tensor": 2 * (mesh.tensor - 1) / mesh.tensor * layer * passes, "data": swapped,
                "expert": (mesh.expert - 1) / mesh.expert * layer * seats * passes * self.moes,
                "fsdp": (mesh.fsdp - 1) / mesh.fsdp * used * microbatches * 3,
                "pipeline": 2 * row * (microbatches * mesh.chunks + mesh.parts()) * (mesh.pipeline > 1)}
        talking = sum(size / speed(axis, mesh.lengths(), device) for axis, size in talk.items() if size)
        seconds = busy * (1 + bubble / microbatches) + talking
        return Layout(seconds, state + gradients + kept, self.useful / (self.count * peak * seconds),
                      bubble / (microbatches + bubble), mesh, microbatches, remat)


def kinds(sharded: Sharded) -> dict[tuple[str, ...], tuple[int, float]]:
    """The mesh axes that weights can be split over -> how many parameters, and the share of them that is trained."""
    sizes, moving, learns = Counter(), Counter(), trained(sharded, sharded.axes)
    for name, text in sharded.axes.items():
        shape = sharded.shapes[name]
        where = tuple(RULES[axis] for axis, size in zip(names(text), shape, strict=True)
                      if RULES[axis] and (axis != "kv" or size > 1))
        sizes[where] += math.prod(shape)
        moving[where] += math.prod(shape) * (name in learns)
    return {where: (size, moving[where] / size) for where, size in sizes.items()}


def text(found: dict[str, Any]) -> str:
    lines = [f"{found['tried']:,} layouts of {found['devices']:,} × {found['device']} in {found['seconds']:.1f} s; "
             f"{found['fit']:,} fit", f"{'step':>9} {'MFU':>6} {'memory':>9} {'bubble':>7}  layout"]
    lines += [f"{one['step_seconds']:8.3f}s {one['mfu']:6.1%} {one['memory_bytes'] / 1e9:6.1f} GB {one['bubble']:7.1%}"
              f"  {' '.join(one['overrides'])}" for one in found["layouts"]]
    lines += ["refused:"] + [f"{times:8,} × {why}" for why, times in itertools.islice(found["refused"].items(), 12)]
    return "\n".join(lines)

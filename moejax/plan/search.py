"""The fastest layout of a config on so many devices: every mesh, schedule, microbatching and remat policy that fits.

A layout is judged by arithmetic alone, on what two small traces of the config count per token and layer; `moejax plan`
counts the winner exactly.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from moejax import config as configs
from moejax.config import Config, ConfigError, Mesh
from moejax.model.sharded import Sharded
from moejax.parallel import hardware, schedules
from moejax.parallel.axes import AXES, BATCH, RULES, names
from moejax.parallel.hardware import Device
from moejax.plan import budget
from moejax.plan.cost import speed
from moejax.plan.count import Count, make_program, trace
from moejax.train.state import trained

ROOM = 0.92  # of a device's memory: the rest is the runtime's


def search(config: Config, on: str, top: int = 10) -> dict[str, Any]:
    """The layouts that fit, fastest first, and why the others were refused.

    Returns: {"layouts": [{"overrides", "step_seconds", "mfu", "memory_bytes", "bubble"}], "tried", "fit", "seconds",
        "refused": {reason: how many}}.
    Raises ConfigError: no such device, or no layout fits.
    """
    begin = time.perf_counter()
    device, count = hardware.named(on, config.hardware, config.mesh.devices())
    judge = Judge(config, device, count)
    refused, found, tried = Counter(), [], 0
    for mesh in meshes(config, count):
        case = replace(config, mesh=mesh, train=replace(config.train, microbatches=1))
        if problems := configs.check(case):
            refused.update({problem.split(";")[0] for problem in problems})
            tried += 1
            continue
        share = config.data.batch // mesh.batch_shards()
        for microbatches in configs.divisors(share):
            if (mesh.schedule == "interleaved" and microbatches % mesh.pipeline) or (
                    mesh.pipeline == 1 and microbatches > 64):
                continue
            for remat in judge.counts:
                tried += 1
                one = judge(mesh, microbatches, remat)
                if one["memory_bytes"] > ROOM * device.memory:
                    refused[f"needs more than {ROOM:.0%} of {device.memory / 1e9:.0f} GB"] += 1
                else:
                    found.append(one)
    if not found:
        raise ConfigError([f"no layout of {count} × {device.name} fits; {times} × {why}"
                           for why, times in refused.most_common(5)])
    found.sort(key=lambda one: (one["step_seconds"], one["memory_bytes"]))
    return {"layouts": found[:top], "tried": tried, "fit": len(found), "refused": dict(refused.most_common()),
            "device": device.name, "devices": count, "seconds": time.perf_counter() - begin}


def meshes(config: Config, count: int) -> Iterator[Mesh]:
    """Every way to share out the devices, with the schedules that a pipeline can have."""
    for lengths in products(count, len(AXES)):
        mesh = replace(config.mesh, **dict(zip(AXES, lengths, strict=True)), fake_devices=0, schedule="1f1b", chunks=1,
                       stage_layers=())
        mesh = replace(mesh, zero1=mesh.data > 1, sequence=mesh.tensor > 1 and config.data.sequence % mesh.tensor == 0)
        yield mesh
        if mesh.pipeline > 1:
            yield replace(mesh, schedule="zero_bubble")
            yield from (replace(mesh, schedule="interleaved", chunks=chunks) for chunks in (2, 4)
                        if mesh.pipeline * chunks <= config.model.layers)


def products(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (count,)
        return
    for first in configs.divisors(count):
        for rest in products(count // first, parts - 1):
            yield (first, *rest)


@cache
def idle(schedule: str, stages: int, chunks: int) -> float:
    """Idle time of a stage in units of one microbatch's forward and backward, whatever their number: counted from a
    table of up to 8 stages, and proportional to how many there are before it.
    """
    some = min(stages, 8)
    table = schedules.SCHEDULES[schedule](some, 2 * some, chunks)
    return 2 * some * table.bubble() / (1 - table.bubble()) * (stages - 1) / max(some - 1, 1)


class Judge:
    """Predicts layouts of one config on devices of one kind."""

    def __init__(self, config: Config, device: Device, count: int):
        self.config, self.device, self.count = config, device, count
        alone = budget.alone(config)
        self.sharded, _, (state, _) = make_program(alone)
        self.counts: dict[str, Count] = {remat: trace(replace(alone, train=replace(alone.train, remat=remat)))
                                         for remat in ("none", "full")}
        self.kinds = kinds(self.sharded)
        learned = sum(size for size, _ in self.kinds.values())
        self.moments = budget.memory_of(self.sharded, state)["optimizer_bytes_per_device"] / learned
        # What a token leaves for the backward pass in a layer, and what a layer needs while it is worked on.
        tokens, gradients = config.data.sequence, 4.0 * learned
        self.saved = max(self.counts["none"].peak - gradients, 0) / (tokens * config.model.layers)
        self.useful = 3 * self.sharded.flops_per_token() * config.data.batch * tokens
        self.flops = {remat: each.flops() * config.data.batch for remat, each in self.counts.items()}
        self.bytes = 2 if config.train.compute == "bfloat16" else 4

    def __call__(self, mesh: Mesh, microbatches: int, remat: str) -> dict[str, Any]:
        model, moe, data, device = self.config.model, self.config.model.moe, self.config.data, self.device
        lengths = {axis: getattr(mesh, axis) for axis in AXES}
        state = gathered = swapped = 0.0
        for where, (size, moving) in self.kinds.items():
            mine = size / math.prod(lengths[axis] for axis in where)
            apart = mesh.data if mesh.zero1 else 1
            state += mine * (4 + (4 + self.moments) * moving / apart)
            if "fsdp" in where:
                gathered += mine * mesh.fsdp * self.bytes
            shares = math.prod(lengths[axis] for axis in BATCH if axis not in where)
            swapped += 2 * (shares - 1) / shares * mine * 4 * moving
        tokens = data.batch * data.sequence / (mesh.batch_shards() * microbatches)  # of a microbatch on a device
        layers = model.layers / mesh.parts()  # of a part
        waiting = min(2 * mesh.parts() - 1, microbatches * mesh.chunks) if mesh.pipeline > 1 else 1
        row = tokens * model.d_model * self.bytes / (mesh.tensor if mesh.sequence else 1)
        work = tokens * self.saved / mesh.tensor  # of a layer, all saved
        kept = layers * work * waiting if remat == "none" else row * waiting * (1 if mesh.pipeline > 1 else layers) + (
            layers if mesh.pipeline > 1 else 1) * work
        # Seconds
        peak = device.flops(self.config.train.compute)
        busy = self.flops[remat] / (self.count * peak)
        bubble = idle(mesh.schedule, mesh.pipeline, mesh.chunks) if mesh.pipeline > 1 else 0.0
        compute = busy * (1 + bubble / microbatches)
        passes = (4 if remat == "none" else 6) * microbatches * model.layers / mesh.pipeline
        layer = tokens * model.d_model * self.bytes
        moes = model.layer_kinds().count("M") / max(model.layers, 1)
        seats = moe.active * (moe.capacity_factor or 1.0)
        talk = {"tensor": 2 * (mesh.tensor - 1) / mesh.tensor * layer * passes,
                "expert": (mesh.expert - 1) / mesh.expert * layer * seats * passes * moes,
                "fsdp": (mesh.fsdp - 1) / mesh.fsdp * gathered * microbatches * 3,
                "pipeline": 2 * row * (microbatches * mesh.chunks + mesh.parts()) * (mesh.pipeline > 1),
                "data": swapped}
        exchange = sum(size / speed(axis, lengths, device) for axis, size in talk.items() if lengths[axis] > 1 or (
            axis == "data" and size))
        seconds = compute + exchange
        mine, usual = self.config.mesh, Mesh()
        changed = [f"mesh.{name}={str(getattr(mesh, name)).lower()}" for name in (
            *AXES, "schedule", "chunks", "zero1", "sequence")
            if {getattr(mesh, name)} != {getattr(mine, name), getattr(usual, name)}]
        return {"overrides": [*changed, f"train.microbatches={microbatches}", f"train.remat={remat}"],
                "step_seconds": seconds, "mfu": self.useful / (self.count * peak * seconds),
                "memory_bytes": state + kept, "bubble": bubble / (microbatches + bubble)}


def kinds(sharded: Sharded) -> dict[tuple[str, ...], tuple[int, float]]:
    """The mesh axes that weights can be split over -> how many parameters, and the share of them that is trained."""
    sizes: Counter = Counter()
    moving: Counter = Counter()
    learns = trained(sharded, sharded.axes)
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

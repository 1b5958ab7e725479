"""The compiler's word: the real step compiled for devices that need not be there, its memory and what it sends."""

import functools
import math
import operator
import os
import re
import time
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from moejax.config import Config, ConfigError
from moejax.parallel import mesh as meshes
from moejax.plan.count import SENT, flops_of, make_program, trace

# Of a GPU, what its compiler asks for: cores, memory, bytes a second, second-level cache, clock in GHz, compute
# capability, shared memory of a core and of a block at most.
GPUS = {"a100": (108, 85100068864, 2039040000000, 41943040, 1.41, (8, 0), 167936, 166912),
        "h100": (132, 85520809984, 3352320000000, 52428800, 1.98, (9, 0), 233472, 232448),
        "h200": (132, 151397597184, 4800000000000, 52428800, 1.98, (9, 0), 233472, 232448),
        "b200": (148, 191514411008, 7672320000000, 132644864, 1.965, (10, 0), 233472, 232448)}
KINDS = {"all-reduce": "all_reduce", "reduce-scatter": "reduce_scatter", "all-gather": "all_gather",
         "all-to-all": "all_to_all", "collective-permute": "permute"}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}
LEAST = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}  # the CPU's own order keeps more
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


def compile_step(config: Config, devices: int = 0, topology: str = "") -> dict[str, Any]:
    """Compile a config's training step and hold it against the plan.

    Args:
        devices: fake CPU devices; the mesh must multiply to them.
        topology: "v5p:8x8x4" or "h200:8", with the wheels of the extra `tpu` or `aot-gpu`; no such device is needed.
    Returns: {"devices", "seconds", "memory": {"arguments", "temporary", "peak"?}, "predicted": the same,
        "sent": {axes: [compiled, predicted]}, "flops": [compiled or None, predicted]}; bytes of one device and step.
    Raises ConfigError: a mesh of another size, an unknown topology, a missing wheel, or too little memory there.
    """
    count = config.mesh.devices()
    if topology:
        found = describe(topology)
    else:
        config = replace(config, mesh=replace(config.mesh, fake_devices=devices or count))
        meshes.start(config.mesh)
        found = jax.devices()[: devices or count]
    if len(found) != count:
        raise ConfigError([f"the mesh axes multiply to {count} and {topology or devices} has {len(found)} devices; set "
                           f"the mesh to {len(found)}, or ask for {count}"])
    _, step, args = make_program(config, meshes.make_mesh(config.mesh, found))
    begin = time.perf_counter()
    try:
        compiled = step.lower(*args).compile(None if topology else LEAST)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError([f"the step must fit into a device's memory; the compiler of {topology} says: "
                           f"{str(error).splitlines()[0][:300]}"]) from None
    seconds, memory, planned = time.perf_counter() - begin, compiled.memory_analysis(), trace(config)
    program = Program(compiled.as_text(), config.mesh.lengths())
    flops, sent = program.total(program.entry)
    return {"devices": count, "on": topology or "cpu", "compute": config.train.compute, "seconds": seconds,
            "memory": {"arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes},
            "predicted": {"arguments": planned.arguments, "temporary": planned.peak},
            "sent": {axes: [round(sent[axes]), round(planned.sent[axes])] for axes in sorted({*sent, *planned.sent})},
            "flops": [flops or None, flops_of(planned.dots)]}


def describe(topology: str) -> list[Any]:
    """The devices of a topology that need not be there."""
    found = re.fullmatch(rf"({'|'.join(GPUS)}|v\w+):([1-9]\d*)((?:x[1-9]\d*)*)", topology.lower())
    if not found:
        raise ConfigError([f"a topology is a TPU's, such as v5p:8x8x4, or one of {', '.join(GPUS)} with a number, such "
                           f"as h200:8; got {topology!r}"])
    name, count = found[1], int(found[2])
    wheel, extra = ("jax_cuda13_plugin", "aot-gpu") if name in GPUS else ("libtpu", "tpu")
    if find_spec(wheel) is None:
        raise ConfigError([f"this compiler is in the wheel {wheel}; pip install 'moejax[{extra}]'"])
    # Not asked for: libraries that only running needs, and the machine's own TPUs.
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_SKIP_MDS_QUERY": "1"}
    jax.config.update("jax_platforms", "cpu")
    if name in GPUS:
        return topologies.get_topology_desc("", platform="cuda", target_config=target(name),
                                            topology=f"1x{-(-count // 8)}x{min(count, 8)}").devices
    try:
        return topologies.get_topology_desc(topology_name=topology.lower(), platform="tpu").devices
    except (RuntimeError, ValueError) as error:
        raise ConfigError([f"libtpu knows no topology {topology!r} ({str(error).splitlines()[0][:200]}); TPUs of three "
                           "dimensions are written v5p:4x4x4, others v5e:4x4"]) from None


def target(name: str) -> str:
    cores, memory, bandwidth, cache, clock, (major, minor), shared, block = GPUS[name]
    return (f"gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
            f"shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128 "
            f"block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: "
            f"{bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory} "
            f"shared_memory_per_block_optin: {block} cuda_compute_capability {{ major: {major} minor: {minor} }} "
            f"registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} platform_name: \"CUDA\" "
            f"dnn_version_info {{ major: 9 minor: 10 }} device_description_str: \"NVIDIA {name.upper()}\"")


class Instruction(NamedTuple):
    kind: str
    shape: str
    rest: str  # operands and attributes


class Program:
    """The text of a compiled program, read for its matmuls and its collectives."""

    def __init__(self, text: str, mesh: dict[str, int]):
        self.mesh, self.entry, name = mesh, "", ""
        self.parts: dict[str, dict[str, Instruction]] = defaultdict(dict)
        self.total = functools.cache(self.total)
        for line in text.splitlines():
            if line.endswith("{") and (found := re.match(r"(ENTRY )?%?([\w.\-]+)[ (]", line)) and " = " not in line:
                name = found[2]
                self.entry = name if found[1] else self.entry
            elif found := LINE.match(line):
                self.parts[name][found[1]] = Instruction(found[3], found[2], found[4])

    def total(self, name: str) -> tuple[float, Counter]:
        """FLOPs of the matmuls and bytes sent by axes, loops as often as they run and the dearest branches."""
        flops, sent = 0.0, Counter()
        for each in self.parts[name].values():
            more, moves = self.one(each, self.parts[name])
            flops += more
            sent.update(moves)
        return flops, sent

    def one(self, each: Instruction, around: dict[str, Instruction]) -> tuple[float, Counter]:
        called = [self.total(part.strip(" %")) for parts in re.findall(
            r"(?:body|calls|true_computation|false_computation|\w+_computations)=(\{[^}]*|[^,]*)", each.rest)
            for part in parts.strip("{").split(",")]
        if each.kind == "conditional":
            return max(flops for flops, _ in called), functools.reduce(operator.or_, (sent for _, sent in called))
        if each.kind == "while":
            known = re.search(r'known_trip_count[^0-9]*"(\d+)"', each.rest)
            ends = self.parts[re.search(r"condition=%?([\w.\-]+)", each.rest)[1]].values()
            limits = [end.rest.split(")")[0] for end in ends if end.kind == "constant"]  # it counts up to one of these
            times = int(known[1]) if known else max((int(limit) for limit in limits if limit.isdigit()), default=1)
            return called[0][0] * times, Counter({axes: x * times for axes, x in called[0][1].items()})
        operands = [around[name] for name in re.findall(r"%?([\w.\-]+)", each.rest.split(")")[0]) if name in around]
        if (kind := KINDS.get(each.kind.removesuffix("-start"))) and operands:
            axes, size = self.axes(each.rest)
            held = sum(bytes_of(operand.shape) for operand in operands)
            return 0.0, Counter({axes: SENT[kind](held, size)}) if axes else Counter()
        if each.kind == "dot":
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)[1]
            left = sizes_of(operands[0].shape)[0][1]
            contracted = [left[int(dim)] for dim in dims.split(",") if dim]
            return 2.0 * math.prod(sizes_of(each.shape)[0][1]) * math.prod(contracted), Counter()
        return sum(flops for flops, _ in called), sum((sent for _, sent in called), Counter())

    def axes(self, rest: str) -> tuple[str, int]:
        """Over which mesh axes a collective goes, and how many devices take part."""
        if named := re.search(r"replica_groups=mesh\[([^]]*)\] ?\{([^}]*)\}", rest):  # its axes may have other names
            lengths = re.findall(r"('[^']*')=(\d+)", named[1])
            ids = np.arange(math.prod(self.mesh.values())).reshape([int(length) for _, length in lengths])
            group = ids[tuple(slice(None) if axis in named[2] else 0 for axis, _ in lengths)].ravel().tolist()
        elif listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
            group = [int(each) for each in listed[1].split(",")]
        elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
            shape, dims, order = ([int(each) for each in (part or "").split(",") if each] for part in iota.groups())
            ids = np.arange(np.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
            group = ids.reshape(shape)[0].tolist()
        else:
            group = range(math.prod(self.mesh.values()))
        places = np.array(np.unravel_index(group, list(self.mesh.values())))
        moving = [axis for axis, place in zip(self.mesh, places, strict=True) if len(set(place.tolist())) > 1]
        return "+".join(moving), len(group)


def sizes_of(shape: str) -> list[tuple[str, list[int]]]:
    return [(kind, [int(each) for each in dims.split(",") if each])
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)]


def bytes_of(shape: str) -> int:
    return sum(BYTES.get(kind, 1) * math.prod(dims) for kind, dims in sizes_of(shape))


def text(found: dict[str, Any]) -> str:
    """What the compiler says beside what the plan says."""
    lines = [f"compiled for {found['devices']:,} devices ({found['on']}) in {found['seconds']:.1f} s; of one device:",
             f"{'':<26} {'compiled':>22} {'planned':>22} {'planned / compiled':>19}"]
    rows = [(f"{part} bytes", found["memory"][part], found["predicted"][part]) for part in found["memory"]]
    rows += [(f"sent over {axes}", *pair) for axes, pair in found["sent"].items()]
    rows.append(("FLOPs of matmuls", *found["flops"]))
    for name, compiled, planned in rows:
        told = "not told" if compiled is None else f"{compiled:,.0f}"
        share = f"{planned / compiled:.4f}" if compiled else ""
        lines.append(f"{name:<26} {told:>22} {planned:22,.0f} {share:>19}".rstrip())
    if found["on"] == "cpu" and found["compute"] == "bfloat16":
        lines.append("(XLA computes and sends bfloat16 as float32 on a CPU; with train.compute=float32 the two agree)")
    return "\n".join(lines)

"""Devices: fake ones on a CPU, the mesh over them, how fast one of them multiplies, and memory that one takes over."""

import math
import os
import timeit
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from moejax import config as configs
from moejax.parallel import hardware, processes

ALIGN = 64  # bytes of host memory: below it, JAX copies


def start(mesh: configs.Mesh, heartbeat: int = 100) -> None:
    """Join the group of processes, if the environment names one, and give this process its share of the fake CPU
    devices, if the config wants any.  Call before anything uses a device; again is harmless.

    Args: heartbeat: seconds without a sign of life after which the other processes of a group end.
    Raises ConfigError: JAX already runs with another number of devices, or they do not divide over the processes;
        Unreachable: the other processes cannot be found.
    """
    group = processes.detect(os.environ)
    if mesh.fake_devices:
        fake(mesh.fake_devices, group)
    if group:
        processes.start(group, heartbeat)
    if mesh.fake_devices and jax.device_count() < mesh.fake_devices:
        raise configs.ConfigError([f"mesh.fake_devices is {mesh.fake_devices}, but this process already runs with "
                                   f"{jax.device_count()} devices; call moejax before using JAX, or set "
                                   f"JAX_NUM_CPU_DEVICES={mesh.fake_devices}"])


def fake(devices: int, group: processes.Group | None) -> None:
    """Ask JAX for this process's share of so many CPU devices."""
    count = group.processes if group else 1
    if count is None or devices % count:
        raise configs.ConfigError([
            f"mesh.fake_devices are shared out evenly among the processes; got {devices} and "
            f"{count or 'a number of processes that only JAX knows'}; " + (
                f"set mesh.fake_devices to a multiple of {count}" if count else processes.REPAIR)])
    # With more devices than cores a collective waits long for its last participant; the default aborts at 40 s.
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=600"
    with suppress(RuntimeError):  # already running; what counts is how many there are
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices // count)


def make_mesh(mesh: configs.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Of a config, over `devices` (all by default).  Raises ConfigError: its axes do not multiply to their number."""
    if devices is None:
        devices = jax.devices()[: mesh.fake_devices] if mesh.fake_devices else jax.devices()
    if mesh.devices() != len(devices):
        raise configs.ConfigError([
            f"the mesh axes must multiply to the number of devices; got {mesh.words()} = {mesh.devices()} and "
            f"{len(devices)} {devices[0].platform} devices; change an axis, or set mesh.fake_devices={mesh.devices()}"])
    # An axis may take a part of one of a TPU's own dimensions: meshes as 8 × 32 on 8 × 8 × 4 need it.
    lengths = mesh.lengths()
    placed = mesh_utils.create_device_mesh(tuple(lengths.values()), list(devices), allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, tuple(lengths), axis_types=(jax.sharding.AxisType.Auto,) * len(lengths))


def peak_flops(device: jax.Device) -> float:
    """FLOP/s of a device, on a CPU as measured now; all processes of a group must call it, as they may share one."""
    if known := hardware.of_kind(device.device_kind):
        return known.bfloat16
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]
    size = 1024
    x = jax.device_put(np.ones((size, size), np.float32), device)
    multiply = jax.jit(lambda x: x @ x @ x @ x @ x)
    multiply(x).block_until_ready()
    processes.barrier("peak")
    seconds = timeit.timeit(lambda: multiply(x).block_until_ready(), number=1)
    share = jax.local_device_count() if device.platform == "cpu" else 1
    return 4 * 2 * size**3 / seconds / share


def host_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, to be filled, then put on devices and not written again: the device shares the memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGN, np.uint8)
    begin = -memory.ctypes.data % ALIGN
    return memory[begin:begin + size].view(dtype).reshape(shape)

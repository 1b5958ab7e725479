"""Devices: fake ones on a CPU, the mesh over them, and how fast one of them multiplies."""

import os
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as configs
from moejax.parallel.axes import AXES

# Dense bfloat16 FLOP/s of one device by the start of its `device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}


def start(mesh: configs.Mesh) -> None:
    """Give this process its fake CPU devices, if the config wants any.  Call before anything uses a device.

    Raises:
        ConfigError: JAX already runs with another number of devices.
    """
    if not mesh.fake_devices:
        return
    # With more devices than cores a collective waits long for its last participant; the default aborts at 40 s.
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=600"
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", mesh.fake_devices)
    except RuntimeError:
        pass  # already running; what counts is how many there are
    if jax.device_count() < mesh.fake_devices:
        raise configs.ConfigError([f"mesh.fake_devices is {mesh.fake_devices}, but this process already runs with "
                                   f"{jax.device_count()} devices; call moejax before using JAX, or set "
                                   f"JAX_NUM_CPU_DEVICES={mesh.fake_devices}"])


def make_mesh(mesh: configs.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a config over `devices` (all by default), with every axis of AXES.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    if devices is None:
        devices = jax.devices()[: mesh.fake_devices] if mesh.fake_devices else jax.devices()
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    if mesh.devices() != len(devices):
        product = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise configs.ConfigError([
            f"the mesh axes must multiply to the number of devices; got {product} = {mesh.devices()} and "
            f"{len(devices)} {devices[0].platform} devices; change an axis, or set mesh.fake_devices={mesh.devices()}"])
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


def peak_flops(device: jax.Device) -> float:
    """FLOP/s of one device: from its data sheet, or on a CPU its share of a float32 matmul measured here."""
    for kind, flops in sorted(PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
        if device.device_kind.startswith(kind):
            return flops
    size = 1024
    x = jax.device_put(np.ones((size, size), np.float32), device)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    begin = time.perf_counter()
    for _ in range(4):
        x = multiply(x, x) * (1 / size)
    x.block_until_ready()
    share = jax.local_device_count() if device.platform == "cpu" else 1
    return 4 * 2 * size**3 / (time.perf_counter() - begin) / share

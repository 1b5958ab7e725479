"""Devices and the mesh over them."""

from unittest.mock import Mock

import jax
import numpy as np
import pytest

from moejax.config import AXES, ConfigError, Mesh
from moejax.parallel import mesh as meshes


def test_every_axis_exists_whatever_the_config_uses():
    mesh = meshes.make_mesh(Mesh(), jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    mesh = meshes.make_mesh(Mesh(fsdp=3, tensor=2), jax.devices()[:6])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 3, "pipeline": 1, "expert": 1, "tensor": 2}
    assert mesh.axis_names == AXES


def test_the_last_axis_holds_neighbouring_devices():
    mesh = meshes.make_mesh(Mesh(data=2, expert=2, tensor=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids.reshape(-1).tolist() == [device.id for device in jax.devices()]


def test_fake_devices_says_how_many_of_the_devices_are_used():
    assert meshes.make_mesh(Mesh(data=3, fake_devices=3)).size == 3


def test_a_mesh_that_does_not_multiply_to_the_devices_is_an_error_with_both_numbers():
    with pytest.raises(ConfigError) as error:
        meshes.make_mesh(Mesh(data=5, tensor=3))
    assert len(error.value.problems) == 1
    for part in ("data 5 × tensor 3 = 15", "8 cpu devices", "mesh.fake_devices=15"):
        assert part in str(error.value)


def test_start_refuses_more_fake_devices_than_the_process_runs_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    jax.devices()  # now their number is fixed
    meshes.start(Mesh(data=8, fake_devices=8))
    with pytest.raises(ConfigError) as error:
        meshes.start(Mesh(data=16, fake_devices=16))
    assert "fake_devices is 16" in str(error.value) and "8 devices" in str(error.value)


def test_start_without_fake_devices_touches_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    meshes.start(Mesh())
    assert meshes.os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize(("kind", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12)])
def test_peak_flops_of_a_known_device_is_that_of_its_longest_name(kind: str, flops: float):
    assert meshes.peak_flops(Mock(spec=jax.Device, device_kind=kind)) == flops


def test_peak_flops_of_a_cpu_is_measured():
    assert 1e7 < meshes.peak_flops(jax.devices()[0]) < 1e14

"""The table of devices, and those that a config adds."""

import pytest

from moejax.config import ConfigError
from moejax.parallel import hardware


def test_a_device_and_how_many():
    assert hardware.named("H100x1024") == (hardware.DEVICES["H100"], 1024)
    assert hardware.named("mi300xx8") == (hardware.DEVICES["MI300X"], 8)
    assert hardware.named("v5p", count=16) == (hardware.DEVICES["v5p"], 16)


def test_every_device_is_whole():
    for device in hardware.DEVICES.values():
        assert 0 < device.float32 <= device.bfloat16 <= device.eight
        assert device.network < device.link < device.bandwidth < device.bfloat16
        assert device.domain >= 8 and device.memory > 1e10
        assert (device.price is None) == (not device.dated)


@pytest.mark.parametrize("kind, name", [("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H200", "H200"), ("TPU v5", "v5p"),
                                        ("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("NVIDIA T4", None)])
def test_what_jax_calls_it(kind, name):
    assert hardware.of_kind(kind) is (hardware.DEVICES[name] if name else None)


@pytest.mark.parametrize("text", ["H10", "h100x0", "", "x8", "H100 x8 x"])
def test_an_unknown_device_is_an_error_with_the_nearest_name(text):
    with pytest.raises(ConfigError, match="did you mean"):
        hardware.named(text)


def test_a_config_adds_its_own():
    mine, count = hardware.named("minex3", ("mine like=H100 price=1.5 memory=94e9",))
    assert (mine.price, mine.memory, mine.bandwidth, mine.dated, count) == (1.5, 94e9, 3.35e12, "", 3)
    full = "own bfloat16=1e12 float32=5e11 eight=2e12 memory=1e10 bandwidth=1e11 link=1e10 domain=4 network=1e9"
    own, _ = hardware.named("own", (full,))
    assert (own.bfloat16, own.domain, own.price) == (1e12, 4, None)


@pytest.mark.parametrize("text", ["", "mine", "mine like=H10", "mine like=H100 prize=1", "mine like=H100 price=free",
                                  "mine like=H100 price=-1", "mine bfloat16=1e12"])
def test_a_wrong_addition_is_an_error_with_an_example(text):
    with pytest.raises(ConfigError, match="like=H100 price"):
        hardware.named("H100", (text,))


def test_this_cpu_is_measured():
    device, _ = hardware.named("cpu")
    assert 1e8 < device.float32 < 1e14 and 1e8 < device.bandwidth < 1e13

"""What devices can do and cost: data sheets, prices with their dates.  Knows no jax; `hardware` of a config adds."""

import difflib
import re
import timeit
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moejax.config import ConfigError


@dataclass(frozen=True)
class Device:
    name: str
    kind: str  # how JAX's `device_kind` begins
    bfloat16: float  # dense FLOP/s
    float32: float  # the same as JAX multiplies by default: TF32 on NVIDIA, one pass of bfloat16 on a TPU
    eight: float  # the same in 8 bits: int8 or fp8, what is faster
    memory: float  # bytes
    bandwidth: float  # of it, bytes a second
    link: float  # bytes a second that it sends to devices of its domain,
    domain: int  # which has so many,
    network: float  # and to those outside
    price: float | None = None  # dollars an hour, rented; None is not known
    dated: str = ""  # when that was so

    def flops(self, compute: str) -> float:
        return self.bfloat16 if compute == "bfloat16" else self.float32


# Prices of GPUs: middle of what smaller clouds ask on demand; of TPUs: Google Cloud's list, United States.
DEVICES = {device.name: device for device in (
    Device("A100", "NVIDIA A100", 312e12, 156e12, 624e12, 80e9, 2.039e12, 300e9, 8, 25e9, 1.30, "2026-05"),
    Device("H100", "NVIDIA H100", 989e12, 494e12, 1979e12, 80e9, 3.35e12, 450e9, 8, 50e9, 2.95, "2026-05"),
    Device("H200", "NVIDIA H200", 989e12, 494e12, 1979e12, 141e9, 4.8e12, 450e9, 8, 50e9, 4.00, "2026-05"),
    Device("B200", "NVIDIA B200", 2250e12, 1125e12, 4500e12, 180e9, 7.7e12, 900e9, 8, 50e9, 5.25, "2026-03"),
    Device("GB300", "NVIDIA GB300", 2500e12, 1250e12, 5000e12, 279e9, 8e12, 900e9, 72, 100e9),
    Device("MI300X", "AMD Instinct MI300X", 1307e12, 654e12, 2615e12, 192e9, 5.3e12, 448e9, 8, 50e9),
    Device("v4", "TPU v4", 275e12, 275e12, 275e12, 34.4e9, 1.228e12, 300e9, 4096, 6.25e9, 3.22, "2025"),
    Device("v5e", "TPU v5 lite", 197e12, 197e12, 393e12, 17.2e9, 0.819e12, 200e9, 256, 3.1e9, 1.20, "2025"),
    Device("v5p", "TPU v5", 459e12, 459e12, 918e12, 102e9, 2.765e12, 600e9, 8960, 6.25e9, 4.20, "2025"),
    Device("v6e", "TPU v6 lite", 918e12, 918e12, 1836e12, 34.4e9, 1.64e12, 400e9, 256, 12.5e9, 2.70, "2025"),
    Device("v7x", "TPU7x", 2307e12, 2307e12, 4614e12, 206e9, 7.38e12, 600e9, 9216, 12.5e9))}


def of_kind(device_kind: str) -> Device | None:
    """The device of the table that JAX calls so."""
    found = [device for device in DEVICES.values() if device_kind.startswith(device.kind)]
    return max(found, key=lambda device: len(device.kind), default=None)


def named(text: str, added: Sequence[str] = (), count: int = 1) -> tuple[Device, int]:
    """ "H100x1024" or "H100": the device and how many, else `count`; "cpu" is measured.  `added` are devices of a
    config, such as "mine like=H100 price=1.9 memory=94e9"; without `like` all numbers are said.  Raises ConfigError.
    """
    name, some = re.fullmatch(r"(.*?)(?:[x×](\d+))?", text.strip(), re.DOTALL).groups()
    table = dict(DEVICES)
    for each in added:
        add(each, table)
    if name.lower() == "cpu":
        return measured(), int(some or count)
    matches = {other.lower(): device for other, device in table.items()}
    if name.lower() not in matches or some == "0":
        near = difflib.get_close_matches(name.lower(), matches, 1, 0)
        raise ConfigError([f"a device is one of {', '.join(table)} or cpu, with a number of them as in H100x1024; got "
                           f"{text!r}; did you mean {matches[near[0]].name}?"])
    return matches[name.lower()], int(some or count)


def add(text: str, table: dict[str, Device]) -> None:
    name, *parts = text.split() or [""]
    values, numbers = dict(part.partition("=")[::2] for part in parts), [field.name for field in fields(Device)[2:-1]]
    like = table.get(values.pop("like", ""))
    try:
        given = {key: (int if key == "domain" else float)(value) for key, value in values.items()}
        if not name or set(given) - set(numbers) or not all(value > 0 for value in given.values()):
            raise ValueError
        base = like or Device("", "", **{key: given[key] for key in numbers if key != "price"})
    except (ValueError, KeyError):
        raise ConfigError([f"hardware names a device and its numbers above 0 ({', '.join(numbers)}), or the one that "
                           f"it is like, as in 'mine like=H100 price=1.9'; got {text!r}"]) from None
    table[name] = replace(base, name=name, **given, **({"dated": ""} if "price" in given else {}))


def measured() -> Device:
    """This machine's CPU: a float32 matmul and a copy, as they run now."""
    x = np.ones((1536, 1536), np.float32)
    y = np.ones(2**25, np.float32)
    matmul, copy = (min(timeit.repeat(work, number=1, repeat=4)) for work in (lambda: x @ x, y.copy))
    flops, copied = 2 * 1536**3 / matmul, 2 * y.nbytes / copy
    return Device("cpu", "cpu", flops, flops, flops, 8e9, copied, copied / 2, 2**20, copied / 2)

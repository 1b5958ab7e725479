"""Memory of the host that a CPU device takes over as it is, and from which others are filled."""

import math
from typing import Any

import numpy as np

ALIGN = 64  # bytes: below it, JAX copies


def host_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, to be filled, then put on devices and not written again: the device shares the memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGN, np.uint8)
    begin = -memory.ctypes.data % ALIGN
    return memory[begin:begin + size].view(dtype).reshape(shape)

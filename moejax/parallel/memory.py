"""Memory of the host that a CPU device takes over as it is, and from which others are filled."""

import math
import mmap
from typing import Any

import numpy as np

ALIGN = 64  # bytes: below it, JAX copies
LARGE = 1 << 21  # bytes from which on memory comes in large pages where the system has them


def host_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, to be filled, then put on devices and not written again: the device shares the memory."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)
    memory = np.zeros(size + ALIGN, np.uint8)
    begin = -memory.ctypes.data % ALIGN
    return memory[begin:begin + size].view(dtype).reshape(shape)

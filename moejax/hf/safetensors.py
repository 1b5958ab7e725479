"""The file format of published weights: eight bytes of length, a JSON header, and the tensors end to end.

Files are mapped, and tensors transposed straight from the page cache: the package safetensors copies each slice first.
"""

import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
PREFIX = 8  # bytes that hold the length of the header, which is padded to a multiple of them


class Header(NamedTuple):
    """Of one tensor; begin and end are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class File:
    """An open file.  Raises ValueError, which says what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        if size < PREFIX:
            raise ValueError(f"it has {size} bytes")
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = PREFIX + int.from_bytes(self.map[:PREFIX], "little")
        if start > size:
            raise ValueError(f"its header ends at byte {start}, the file at {size}")
        self.tensors: dict[str, Header] = {}
        try:
            for name, one in json.loads(self.map[PREFIX:start]).items():
                if name != "__metadata__":
                    (begin, end), dtype, shape = one["data_offsets"], one["dtype"], one["shape"]
                    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
                        raise ValueError(f"a tensor has a dtype, a shape and two offsets; got {one}")
                    self.tensors[name] = Header(dtype, tuple(shape), start + begin, start + end)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header cannot be read: {type(error).__name__}: {error}") from None
        at = start  # the tensors fill what follows the header, end to end
        for name, one in sorted(self.tensors.items(), key=lambda item: item[1][2:]):
            known = DTYPES.get(one.dtype)
            taken = math.prod(one.shape) * known.itemsize if known is not None else one.end - one.begin
            if not at == one.begin <= one.end <= size or one.end - one.begin != taken:
                raise ValueError(f"{name} is {one.dtype}{list(one.shape)} and lies from byte {one.begin} to {one.end}, "
                                 f"what is before it ends at {at}, and the file at {size}")
            at = one.end
        if at != size:
            raise ValueError(f"its tensors end at byte {at}, the file at {size}")

    def view(self, name: str) -> np.ndarray:
        """The tensor, in the mapped file."""
        one = self.tensors[name]
        return np.ndarray(one.shape, DTYPES[one.dtype], self.map, one.begin)

    def leave(self, name: str) -> None:
        """The tensor's pages need not stay in this process's memory."""
        one, page = self.tensors[name], mmap.PAGESIZE
        begin = -(-one.begin // page) * page
        if one.end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, begin, one.end - begin)


def write(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], get: Callable[[str], np.ndarray]) -> None:
    """A file of these dtypes and shapes, whose tensors are asked for one at a time."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % PREFIX)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(PREFIX, "little") + text)
        for name, (dtype, _) in tensors.items():
            file.write(np.ascontiguousarray(get(name).astype(DTYPES[dtype])).view(np.uint8).data)


def shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The names in order, at most so many bytes, or one, at a time."""
    found, total = [[]], 0
    for name, size in sizes.items():
        if found[-1] and total + size > most:
            found.append([])
            total = 0
        found[-1].append(name)
        total += size
    return found

"""The file format of published weights: eight bytes of length, a JSON header, and the tensors end to end.

Files are mapped, so that a tensor is transposed and widened straight from the page cache: the package safetensors
copies every slice first, at which an import takes twice as long.
"""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
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
        size = path.stat().st_size
        if size < PREFIX:
            raise ValueError(f"it has {size} bytes")
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = PREFIX + int.from_bytes(self.map[:PREFIX], "little")
        if start > size:
            raise ValueError(f"its header ends at byte {start}, the file at {size}")
        try:
            found = json.loads(self.map[PREFIX:start])
            self.tensors = {name: Header(one["dtype"], tuple(one["shape"]), *(start + at for at in one["data_offsets"]))
                            for name, one in found.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its header cannot be read: {error}") from None
        for name, one in self.tensors.items():
            if not start <= one.begin <= one.end <= size:
                raise ValueError(f"{name} ends at byte {one.end}, the file at {size}")
            known = DTYPES.get(one.dtype)
            if known is not None and np.prod(one.shape, dtype=np.int64) * known.itemsize != one.end - one.begin:
                raise ValueError(f"{name} is {one.dtype}{list(one.shape)} and has {one.end - one.begin} bytes")

    def view(self, name: str) -> np.ndarray:
        """The tensor, in the mapped file."""
        one = self.tensors[name]
        return np.frombuffer(self.map, np.uint8, one.end - one.begin, one.begin).view(DTYPES[one.dtype]).reshape(
            one.shape)

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
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % PREFIX)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(PREFIX, "little") + text)
        for name, (dtype, _) in tensors.items():
            file.write(np.ascontiguousarray(get(name).astype(DTYPES[dtype])).view(np.uint8).data)


def shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """The names in order, at most so many bytes, or one, at a time."""
    some, total = [], 0
    for name, size in sizes.items():
        if some and total + size > most:
            yield some
            some, total = [], 0
        some.append(name)
        total += size
    yield some

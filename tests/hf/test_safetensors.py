"""Our safetensors against the library's, both ways, and what is wrong with a file is said."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from moejax.hf.safetensors import DTYPES, File, Header, shards, write

KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPES = {"plain.weight": (3, 5), "a scalar": (), "nothing": (0,), "no rows": (0, 4), "no columns": (4, 0),
          "Gewichte – größer 重み 🙂": (2, 3, 7), 'quoted "name"\n': (1,)}


def values(kind: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape).astype(KINDS[kind]) for name, shape in SHAPES.items()}


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", DTYPES)
def test_the_library_reads_what_we_write(kind, tmp_path):
    expected = values(kind)
    write(tmp_path / "ours", {name: (kind, shape) for name, shape in SHAPES.items()},
          lambda name: expected[name].astype(np.float32))
    found = load_file(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same(found[name], value)
    with safe_open(tmp_path / "ours", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


@pytest.mark.parametrize("kind", DTYPES)
def test_we_read_what_the_library_writes(kind, tmp_path):
    expected = values(kind)
    save_file(expected, tmp_path / "theirs", metadata={"format": "pt", "more": "of it"})
    file = File(tmp_path / "theirs")
    assert file.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert file.tensors[name].dtype == kind
        same(file.view(name), value)
        file.leave(name)
        same(file.view(name), value)  # the pages come back from the file


def test_tensors_of_other_dtypes_are_named(tmp_path):
    """A checkpoint that has them is refused where they are used, not where the file is opened."""
    others = {"F64": np.float64, "I8": np.int8, "I64": np.int64, "BOOL": np.bool_, "U16": np.uint16}
    save_file({name: np.ones(3, kind) for name, kind in others.items()}, tmp_path / "file")
    assert {name: one.dtype for name, one in File(tmp_path / "file").tensors.items()} == {name: name for name in others}


def test_a_file_of_nothing(tmp_path):
    save_file({}, tmp_path / "theirs")
    write(tmp_path / "ours", {}, lambda name: np.zeros(()))
    assert File(tmp_path / "theirs").tensors == File(tmp_path / "ours").tensors == load_file(tmp_path / "ours") == {}


def test_the_bytes_of_a_file(tmp_path):
    write(tmp_path / "file", {"a": ("F16", (2,)), "b": ("F32", ())}, {"a": np.array([1, -2.0]), "b": np.array(3)}.get)
    data = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0 and json.loads(data[8:start])["b"] == {"dtype": "F32", "shape": [], "data_offsets": [4, 8]}
    assert data[start:] == bytes.fromhex("003c00c0" "00004040")  # 1, -2 and 3
    assert File(tmp_path / "file").tensors["a"] == Header("F16", (2,), start, start + 4)


def file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(begin: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(("data", "message"), {
    "empty": (b"", "it has 0 bytes"),
    "five bytes": (b"abcde", "it has 5 bytes"),
    "only a length": (file(b""), "its header cannot be read"),
    "a header that is cut": (file({"a": one(0, 8)}, length=1000), "its header ends at byte 1008, the file at "),
    "a web page": (b"<!DOCTYPE html>" * 9, "its header ends at byte "),
    "no JSON": (file(b"{nope}"), "its header cannot be read"),
    "no text": (file(b"\xff\xfe{\x00"), "its header cannot be read"),
    "a list": (file([]), "its header cannot be read"),
    "a number": (file(12), "its header cannot be read"),
    "very deep": (file(b"[" * 100_000), "its header cannot be read"),
    "a tensor that is a list": (file({"a": []}), "its header cannot be read"),
    "no offsets": (file({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8), "its header cannot be read"),
    "three offsets": (file({"a": one(0, 8) | {"data_offsets": [0, 4, 8]}}, b"x" * 8), "its header cannot be read"),
    "texts": (file({"a": one("0", "8")}, b"x" * 8), "a tensor has a dtype, a shape and two offsets; got "),
    "a fraction": (file({"a": one(0, 8.0)}, b"x" * 8), "two offsets"),
    "a fraction in a shape": (file({"a": one(0, 8, [2.0])}, b"x" * 8), "two offsets"),
    "a shape below zero": (file({"a": one(0, 8, [-1, -2])}, b"x" * 8), "two offsets"),
    "an offset below zero": (file({"a": one(-8, 0)}, b"x" * 8), "two offsets"),
    "a shape that is text": (file({"a": one(0, 8, "2")}, b"x" * 8), "two offsets"),
    "no dtype": (file({"a": one(0, 8, [2], None)}, b"x" * 8), "a dtype"),
    "data that is cut": (file({"a": one(0, 8)}, b"x" * 7), "a is .* and lies from byte "),
    "data beyond": (file({"a": one(0, 8)}, b"x" * 9), "its tensors end at byte "),
    "back to front": (file({"a": one(8, 0)}, b"x" * 8), "a is .* and lies from byte "),
    "on each other": (file({"a": one(0, 8), "b": one(4, 12)}, b"x" * 12), "b is .* and lies from byte "),
    "the same": (file({"a": one(0, 8), "b": one(0, 8)}, b"x" * 8), "b is .* and lies from byte "),
    "a hole": (file({"a": one(0, 8), "b": one(12, 20)}, b"x" * 20), "b is .* and lies from byte "),
    "twice": (file(b'{"a": %s, "a": %s}' % tuple(json.dumps(one(at, at + 8)).encode() for at in (0, 8)),
                   b"x" * 16), "a is .* and lies from byte "),
    "too few bytes": (file({"a": one(0, 8, [3])}, b"x" * 8), r"a is F32\[3\] and lies from byte "),
    "more than can be counted": (file({"a": one(0, 0, [2**40, 2**40])}), "a is F32.* and lies from byte "),
}.values())
def test_what_is_wrong_with_a_file(data, message, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        File(tmp_path / "file")
    with pytest.raises((SafetensorError, ValueError)):  # as the library does
        load_file(tmp_path / "file")


def test_shards_fill_up_in_order():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 2, "f": 2}
    assert list(shards(sizes, 5)) == [["a"], ["b"], ["c"], ["d", "e", "f"]]  # c alone is too large, 1 + 2 + 2 = 5
    assert list(shards(sizes, 100)) == [[*sizes]]

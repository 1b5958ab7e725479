"""Images: the files that can be met, the windows by hand, and the processes that decode."""

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moejax.config import Config, ConfigError, Data, Model
from moejax.data import images, loader
from moejax.data.batch import Batch
from moejax.data.images import Decoders, Ref, decode, read_images
from moejax.data.loader import open_corpus
from moejax.data.samples import AHEAD, Samples, make_samples, train_batch, validation_batches

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ABOUT = 3  # of 255, by which JPEG and resizing may miss a colour


def save(path: Path, colour=RED, size=(6, 4), mode="RGB", **options) -> Path:
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def at(path: Path, video: bool = False) -> Ref:
    return Ref(path.name, str(path), 0, -1, video)


def read(path: Path, size: int = 4, fit: str = "crop") -> np.ndarray:
    pixels = decode(at(path), size, fit, 1, 1.0)
    assert not isinstance(pixels, str), pixels
    assert pixels.shape == (1, size, size, 3) and pixels.dtype == np.uint8
    return pixels[0]


def refused(path: Path, video: bool = False) -> str:
    why = decode(at(path, video), 4, "crop", 2, 1.0)
    assert isinstance(why, str) and "\n" not in why
    return why


def near(pixels: np.ndarray, colour, about: int = ABOUT) -> bool:
    return bool((abs(pixels.astype(int) - colour) <= about).all())


# Files


def quarters(width: int = 8, height: int = 8) -> Image.Image:
    """Red, green above blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    up, left = height // 2, width // 2
    pixels[:up, :left], pixels[:up, left:], pixels[up:, :left], pixels[up:, left:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels)


def corners(pixels: np.ndarray) -> list:
    return [tuple(pixels[row, column].tolist()) for row in (0, -1) for column in (0, -1)]


@pytest.mark.parametrize("orientation, expected", [
    (1, [RED, GREEN, BLUE, WHITE]), (2, [GREEN, RED, WHITE, BLUE]), (3, [WHITE, BLUE, GREEN, RED]),
    (4, [BLUE, WHITE, RED, GREEN]), (5, [RED, BLUE, GREEN, WHITE]), (6, [BLUE, RED, WHITE, GREEN]),
    (7, [WHITE, GREEN, BLUE, RED]), (8, [GREEN, WHITE, RED, BLUE])])
def test_exif_turns_a_picture(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters().save(tmp_path / "a.png", exif=exif)
    assert corners(read(tmp_path / "a.png", 8)) == expected
    quarters().save(tmp_path / "b.png", exif=b"Exif\0\0XX damaged")
    assert corners(read(tmp_path / "b.png", 8)) == [RED, GREEN, BLUE, WHITE]


def test_crop_takes_the_middle_and_squash_everything(tmp_path):
    # 12 x 4: thirds of red, green and blue; the middle square is green
    pixels = np.repeat(np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), 4, axis=0), 4, axis=1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert near(read(tmp_path / "a.png", 4)[:, 1:3], GREEN)
    squashed = read(tmp_path / "a.png", 12, "squash")
    assert near(squashed[:, 1], RED, 40) and near(squashed[:, 5], GREEN, 40) and near(squashed[:, 10], BLUE, 40)
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "b.png")
    assert np.array_equal(read(tmp_path / "b.png", 4), read(tmp_path / "a.png", 4).transpose(1, 0, 2))


@pytest.mark.parametrize("width, height", [(37, 23), (23, 37), (16, 16), (100, 9), (5, 7)])
def test_a_crop_equals_resizing_everything_first(tmp_path, width, height):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    size, shorter = 8, min(width, height)
    whole = image.resize((size * width // shorter, size * height // shorter), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    slow = np.asarray(whole.crop((left, top, left + size, top + size)))
    assert near(read(tmp_path / "a.png", size), slow, 1)  # rounding


def test_modes_become_red_green_and_blue(tmp_path):
    save(tmp_path / "cmyk.jpg", RED, mode="CMYK")
    assert near(read(tmp_path / "cmyk.jpg"), RED)
    save(tmp_path / "grey.jpg", (90, 90, 90), mode="L")
    assert near(read(tmp_path / "grey.jpg"), (90, 90, 90))
    Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert near(read(tmp_path / "deep.png"), [40_000 >> 8] * 3, 0)
    save(tmp_path / "one.bmp", WHITE, mode="1")
    assert near(read(tmp_path / "one.bmp"), WHITE)
    palette = Image.new("P", (6, 6), 1)
    palette.putpalette([0, 0, 0, *BLUE])
    palette.save(tmp_path / "palette.png")
    assert near(read(tmp_path / "palette.png"), BLUE)
    palette.save(tmp_path / "clear.png", transparency=1)
    assert near(read(tmp_path / "clear.png"), WHITE)
    palette.save(tmp_path / "bytes.png", transparency=b"\xff\x80")  # blue is half there
    assert near(read(tmp_path / "bytes.png"), (127, 127, 255))
    Image.new("RGBA", (6, 6), (255, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True)
    assert near(read(tmp_path / "half.webp"), (255, 127, 127))
    Image.new("LA", (6, 6), (0, 0)).save(tmp_path / "la.png")
    assert near(read(tmp_path / "la.png"), WHITE)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_of_what_moves_the_first_picture(tmp_path, ending):
    first, second = Image.new("RGB", (6, 6), GREEN), Image.new("RGB", (6, 6), RED)
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second])
    assert near(read(tmp_path / f"a.{ending}"), GREEN, 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (100_000, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_thin_and_small_pictures(tmp_path, size, fit):
    save(tmp_path / "a.png", BLUE, size)
    assert near(read(tmp_path / "a.png", 224, fit), BLUE)


def test_a_large_jpeg_is_shrunk_as_it_is_decoded(tmp_path):
    quarters(2000, 1200).save(tmp_path / "a.jpg", quality=95)
    pixels = read(tmp_path / "a.jpg", 16)
    assert all(near(np.array(one), colour, 40)
               for one, colour in zip(corners(pixels), [RED, GREEN, BLUE, WHITE], strict=True))
    exact = np.asarray(quarters(2000, 1200).crop((400, 0, 1600, 1200)).resize((16, 16), Image.Resampling.BICUBIC))
    assert abs(pixels.astype(int) - exact).mean() < 4


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG of so many pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_what_cannot_be_used_says_why(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.webp", "cut.gif", "cut.bmp"):
        noise.save(tmp_path / name)
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
        assert refused(tmp_path / name)
    assert "truncated" in refused(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("hello")
    assert refused(tmp_path / "text.png") == "it is not a picture (JPEG, PNG, WEBP, GIF, BMP)"
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow would run ghostscript
    assert refused(tmp_path / "a.jpg").startswith("it is not a picture")
    (tmp_path / "void.png").write_bytes(b"")
    assert refused(tmp_path / "void.png").startswith("it is not a picture")
    (tmp_path / "bomb.png").write_bytes(bomb(10_000, 8_000))
    assert refused(tmp_path / "bomb.png") == f"it has 10000 x 8000 pixels; {2**26} are the most"
    (tmp_path / "warned.png").write_bytes(bomb(10_000, 10_000))  # of which Pillow warns
    assert "10000 x 10000" in refused(tmp_path / "warned.png")
    (tmp_path / "huge.png").write_bytes(bomb(2**31 - 1, 2**31 - 1))
    assert refused(tmp_path / "huge.png")
    assert refused(tmp_path / "missing.png") == refused(tmp_path) == "there is no such file"
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(tmp_path / "pipe.png") == "there is no such file"
    assert refused(Path("nul\0.png")) == "there is no such file" or "null" in refused(Path("nul\0.png"))


def test_reading_for_generation(tmp_path):
    save(tmp_path / "a.png", RED)
    save(tmp_path / "b.jpg", BLUE)
    one, two = read_images([tmp_path / "a.png", str(tmp_path / "b.jpg")], 4, "crop", 3, 1.0)
    assert near(one, RED) and near(two, BLUE) and one.shape == (1, 4, 4, 3)
    (tmp_path / "c.png").write_text("x")
    with pytest.raises(ConfigError) as error:
        read_images([tmp_path / "a.png", tmp_path / "c.png", "missing.gif"], 4, "crop", 1, 1.0)
    assert error.value.problems == [
        f"an image must be a file that can be read; {tmp_path}/c.png is not (it is not a picture (JPEG, PNG, WEBP, "
        "GIF, BMP)); repair it, or name another",
        "an image must be a file that can be read; missing.gif is not (there is no such file); repair it, or name "
        "another"]


# Videos


def film(path: Path, seconds: float, fps: int = 10, size: int = 32, gop: int = 12, turn: int = 0) -> Path:
    """Frame i is grey of brightness i."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = size, size, "yuv420p", 4_000_000
        stream.codec_context.gop_size = gop
        for number in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), number % 250, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightness(path: Path, frames: int, rate: float = 1.0) -> list[int]:
    pixels = decode(at(path, True), 4, "crop", frames, rate)
    assert not isinstance(pixels, str), pixels
    return pixels.mean(axis=(1, 2, 3)).round().astype(int).tolist()


def close_to(found: list[int], expected: list[int]) -> bool:
    return len(found) == len(expected) and all(abs(a - b) <= ABOUT for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "mov"])
def test_frames_are_evenly_spaced(tmp_path, ending):
    path = film(tmp_path / f"a.{ending}", 4, 20)  # frames 0..79
    # one a second: the middles of 4 seconds are 0.5, 1.5, 2.5 and 3.5
    assert close_to(brightness(path, 8), [10, 30, 50, 70])
    assert close_to(brightness(path, 2), [20, 60])  # more than allowed: the middles of two halves
    assert close_to(brightness(path, 99, 5.0), [2 + 4 * n for n in range(20)])
    assert close_to(brightness(path, 8, 0.01), [40])  # one at least


def test_a_video_that_says_so_is_turned(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(quarters(64, 64))))
        container.mux(stream.encode())
    upright, data = decode(at(path, True), 8, "crop", 1, 1.0), bytearray(path.read_bytes())
    # the matrix of a telephone held upright, a quarter turn clockwise, 44 bytes after the name of its box
    first = data.index(b"tkhd") + 44
    data[first : first + 36] = struct.pack(">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)
    path.write_bytes(data)
    turned = decode(at(path, True), 8, "crop", 1, 1.0)
    assert near(turned[0], np.rot90(upright[0], -1), 4) and not near(turned, upright, 99)


def test_a_long_video_is_jumped_through(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", 24)  # frames 0..239
    expected = [20 + 40 * n for n in range(6)]
    assert close_to(brightness(path, 6), expected)
    monkeypatch.setattr(images, "SKIP", 0.1)
    assert close_to(brightness(path, 6), expected)


def test_a_video_with_no_length_is_read_through(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(film(tmp_path / "a.mkv", 3))) as container:
        class Blank:  # a container that does not say
            duration, demux, seek = None, container.demux, container.seek

        class Stream:
            start_time, duration, time_base = None, None, container.streams.video[0].time_base

        Blank.demux = lambda self, _: container.demux(container.streams.video[0])
        assert images.span(Blank(), Stream()) == pytest.approx((0.0, 3.0), abs=0.11)


def test_pictures_are_no_videos_and_the_reverse(tmp_path, monkeypatch):
    save(tmp_path / "a.mp4", RED, format="PNG")
    assert refused(tmp_path / "a.mp4", True) == "it is not a video (mp4, webm, mov, mkv, avi)"
    film(tmp_path / "b.mp4", 1)
    assert refused(tmp_path / "b.mp4") == "it is not a picture (JPEG, PNG, WEBP, GIF, BMP)"
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1\n{tmp_path}/b.mp4\n")  # it could name any address
    assert refused(tmp_path / "list.mp4", True) == "it is not a video (mp4, webm, mov, mkv, avi)"
    os.truncate(tmp_path / "b.mp4", (tmp_path / "b.mp4").stat().st_size // 2)
    assert refused(tmp_path / "b.mp4", True)
    monkeypatch.setitem(sys.modules, "av", None)
    assert refused(tmp_path / "b.mp4", True) == (
        "a video needs the optional package av, which is not installed; pip install av")


# Windows


def config(folder: Path, *sources, kind: str = "last", most: int = 2, sequence: int = 8, **options) -> Config:
    model = Model(vision="clip size=4 patch=2 width=8 layers=1 heads=2 hidden=8", cross=f"{kind} frames=2")
    data = {"sources": tuple(map(str, sources)), "cache": str(folder / "cache"), "validation": 0.0,
            "sequence": sequence, "images": most, **options}
    return Config(name="x", run_dir="x", model=model, data=Data(**data))


def samples_of(config: Config, part: str = "train", say=lambda text: pytest.fail(text)) -> Samples:
    return make_samples(config, open_corpus(config.data, config.model.vocab), part, say)


def all_of(config: Config, say=lambda text: pytest.fail(text)) -> tuple[Batch, int]:
    """All windows in the order of the text, and how many images are missing."""
    samples = samples_of(config, say=say)
    (batch,) = validation_batches(samples, len(samples), 1)
    samples.close()
    return batch, samples.missing


def lines(folder: Path, *documents) -> Path:
    """A .jsonl: a part that ends in .png is an image, in .mp4 a video, else text."""
    kinds = {".png": "image", ".mp4": "video"}
    rows = [{"parts": [{kinds.get(part[-4:], "text"): part} for part in parts]} for parts in documents]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DOCUMENTS = [["r.png", "ab", "g.png", "c"], ["d"], ["ef", "b.png"], ["g.png", "r.png"]]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, colour in (("r", RED), ("g", GREEN), ("b", BLUE)):
        save(tmp_path / f"{name}.png", colour)
    return tmp_path


@pytest.mark.parametrize("kind", ["last", "all"])
def test_windows_by_hand(folder, kind):
    batch, missing = all_of(config(folder, lines(folder, *DOCUMENTS), kind=kind))
    # the second document fits behind the first; the third and the fourth have three images, a window two
    assert batch.tokens.tolist() == [[257, 97, 98, 257, 99, 256, 100, 256], [101, 102, 257, 256, 0, 0, 0, 0],
                                     [257, 257, 256, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[97, 98, 257, 99, 256, 100, 256, 0], [102, 257, 256, 0, 0, 0, 0, 0],
                                      [257, 256, 0, 0, 0, 0, 0, 0]]
    # no image, no first token of another document and no padding counts
    assert batch.weights.tolist() == [[1, 1, 0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.images.frames.tolist() == [[1, 1], [1, 0], [1, 1]] and missing == 0
    first = {"last": [1, 1, 1, 0, 0, 0, 0, 0], "all": [1, 1, 1, 1, 1, 1, 0, 0]}[kind]
    third = {"last": [1, 0, 0, 0, 0, 0, 0, 0], "all": [1, 1, 1, 0, 0, 0, 0, 0]}[kind]
    assert batch.images.looks.transpose(0, 2, 1).astype(int).tolist() == [
        [first, [0, 0, 0, 1, 1, 1, 0, 0]], [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8], [third, [0, 1, 1, 0, 0, 0, 0, 0]]]
    for row, colours in enumerate([[RED, GREEN], [BLUE, (0, 0, 0)], [GREEN, RED]]):
        for slot, colour in enumerate(colours):
            assert near(batch.images.pixels[row, slot, 0], colour) and not batch.images.pixels[row, slot, 1].any()
    assert [(part.dtype.name, part.shape) for part in [*batch[:4], *batch.images]] == [
        ("int32", (3, 8)), ("int32", (3, 8)), ("float32", (3, 8)), ("int32", (3,)), ("uint8", (3, 2, 2, 4, 4, 3)),
        ("int32", (3, 2)), ("bool", (3, 8, 2))]


def test_a_long_document_is_cut_and_its_images_lie_in_the_pieces(folder):
    batch, _ = all_of(config(folder, lines(folder, ["r.png", "abcd", "g.png", "b.png", "e"], ["f"]), sequence=4))
    # 257 a b c | d 257 257 e | 256 f 256: the last piece shares a window with the next document
    assert batch.tokens.tolist() == [[257, 97, 98, 99], [100, 257, 257, 101], [256, 102, 256, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch.images.looks.transpose(0, 2, 1).astype(int).tolist() == [
        [[1, 1, 1, 1], [0] * 4], [[0, 1, 0, 0], [0, 0, 1, 1]], [[0] * 4, [0] * 4]]


@pytest.mark.parametrize("kind", ["last", "all"])
def test_of_too_many_images_the_first_are_there(folder, kind):
    batch, missing = all_of(config(folder, lines(folder, ["a", "r.png", "b", "g.png", "cd"]), kind=kind, most=1))
    assert batch.tokens[0].tolist() == [97, 257, 98, 257, 99, 100, 256, 0] and missing == 0
    assert near(batch.images.pixels[0, 0, 0], RED)
    # what stands after the second would look at it, and counts for nothing
    assert batch.weights[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert batch.images.looks[0, :, 0].astype(int).tolist() == (
        [0, 1, 1, 0, 0, 0, 0, 0] if kind == "last" else [0, 1, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize("kind", ["last", "all"])
def test_an_image_that_cannot_be_used_is_counted_and_said_once(folder, kind):
    (folder / "x.png").write_text("no picture")
    source = lines(folder, ["r.png", "a", "x.png", "b"], ["x.png", "c"])
    said: list[str] = []
    batch, missing = all_of(config(folder, source, kind=kind), said.append)
    assert said == [f"an image is left out wherever it comes: {folder}/x.png cannot be used: it is not a picture "
                    "(JPEG, PNG, WEBP, GIF, BMP)"] and missing == 2
    assert batch.tokens.tolist() == [[257, 97, 257, 98, 256, 0, 0, 0], [257, 99, 256, 0, 0, 0, 0, 0]]
    assert batch.images.frames.tolist() == [[1, 0], [0, 0]] and not batch.images.pixels[:, 1].any()
    assert batch.weights.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert not batch.images.looks[0, :, 1].any() and not batch.images.looks[1].any()
    assert batch.images.looks[0, :, 0].sum() == (2 if kind == "last" else 5)


def test_videos_fill_their_frames(folder):
    film(folder / "v.mp4", 3)
    batch, _ = all_of(config(folder, lines(folder, ["v.mp4", "r.png", "a"])))
    assert batch.images.frames.tolist() == [[2, 1]]  # of three seconds two frames, as the model takes no more
    assert close_to(batch.images.pixels[0, 0].mean(axis=(1, 2, 3)).astype(int).tolist(), [7, 22])


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip([*one[:4], *one.images], [*other[:4], *other.images], strict=True))


def test_batches_depend_on_seed_and_step_alone(folder):
    names = ("r.png", "g.png", "b.png")
    conf = config(folder, lines(folder, *([names[n % 3], chr(97 + n) * (1 + n % 5)] for n in range(20))), most=1)
    one, other = samples_of(conf), samples_of(conf)
    assert len(one) == 20
    forward = []
    for step in range(8):  # 24 samples: beyond the first epoch
        one.ahead(3 * (step + 1) + np.arange(3))
        forward.append(train_batch(one, 3, step))
    for step in reversed(range(8)):
        assert same(train_batch(other, 3, step), forward[step])
    tokens = np.concatenate([batch.tokens for batch in forward])
    assert len(np.unique(tokens[:20], axis=0)) == 20 and not np.array_equal(tokens[:3], tokens[20:23])
    assert np.concatenate([batch.rows for batch in forward]).tolist() == list(range(24))
    parts = [one.rows(np.array([6])), one.rows(np.array([7, 8]))]  # two hosts
    assert np.array_equal(np.concatenate([part.images.pixels for part in parts]), forward[2].images.pixels)
    for step in range(50):
        one.ahead(3 * step + np.arange(3))
    assert len(one.waiting) <= AHEAD * 3
    one.close()
    other.close()


def test_validation_fills_up_with_what_counts_for_nothing(folder):
    (folder / "x.png").write_text("no picture")
    samples = samples_of(config(folder, lines(folder, *DOCUMENTS, ["x.png", "abcdef"])), say=lambda _: None)
    first, second = validation_batches(samples, 3, 9)
    assert samples.missing == 1 and first.weights.any(axis=1).all() and not second.weights.any()
    samples.close()


def shard(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_gives_the_same_batches_as_json_lines(folder):
    pictures = {name: (folder / name).read_bytes() for name in ("r.png", "g.png", "b.png")}
    plain, _ = all_of(config(folder, lines(folder, *DOCUMENTS)))
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    tar = shard(folder / "a.tar", *((f"./{name}", data) for name, data in pictures.items()),
                *((f"{number}.json", json.dumps(row).encode()) for number, row in enumerate(rows)))
    groups, _ = all_of(config(folder, tar))
    # three groups of a picture alone come before them
    assert groups.tokens[0].tolist() == [257, 256, 257, 256, 0, 0, 0, 0]
    assert all(np.array_equal(a, b[-3:]) for a, b in zip(
        [*plain[:3], *plain.images], [*groups[:3], *groups.images], strict=True))
    jumbled = shard(folder / "b.tar", ("x/1.txt", b"ab"), ("x/2.png", pictures["g.png"]), ("x/1.json", b'{"id": 7}'),
                    ("x/1.a.PNG", pictures["r.png"]), ("x/.hidden.txt", b"no"), ("x/1.cls", b"3"),
                    ("x/2.json", b'{"text": "<image>"}'), ("y/1.jpg", b"bad"))
    said: list[str] = []
    batch, missing = all_of(config(folder, jumbled, sequence=14), said.append)
    # the image of a group before its text; a .json's own text; another folder is another group
    assert batch.tokens.tolist() == [[257, 97, 98, 256, *b"<image>", 256, 257, 256]]
    assert missing == 1 and said[0].startswith(f"an image is left out wherever it comes: y/1.jpg in {jumbled} cannot")
    assert near(batch.images.pixels[0, 0, 0], RED)


def test_text_with_images_and_none_wanted(folder):
    conf = config(folder, lines(folder, *DOCUMENTS), most=0)
    samples = samples_of(conf)
    assert type(samples) is Samples and samples.missing == 0
    batch = samples.rows(np.arange(1))
    assert batch.images is None and (batch.weights == 1).all() and 257 in samples.tokens[:]
    samples.ahead(np.arange(2))
    samples.close()
    (folder / "plain.txt").write_text("text alone")
    batch, _ = all_of(config(folder, folder / "plain.txt", sequence=20))
    assert batch.weights[0].tolist() == [1.0] * 10 + [0.0] * 10 and not batch.images.looks.any()


def test_the_cache_keeps_the_images_of_both_parts(folder, monkeypatch):
    monkeypatch.setattr(loader, "LETTERS", 5)
    source = lines(folder, *([f"{'rgb'[n % 3]}.png", chr(97 + n)] for n in range(26)))
    data = config(folder, source, validation=0.3).data
    fresh, again = open_corpus(data), open_corpus(data)
    assert (fresh.cached, again.cached) == (False, True)
    (home,) = (folder / "cache").iterdir()
    assert {"train-images.jsonl", "train-images.npy", "validation-images.jsonl"} <= {p.name for p in home.iterdir()}
    found = []
    for part in loader.PARTS:
        stream, refs = getattr(again, part)[:], again.images[part]
        assert refs.table[:, 0].tolist() == np.flatnonzero(stream == 257).tolist()
        for number, place in enumerate(refs.table[:, 0]):
            letter = int(stream[place + 1])
            assert refs[number] == at(folder / f"{'rgb'[(letter - 97) % 3]}.png")
            found.append(letter)
    assert sorted(found) == list(range(97, 123)) and 0 < len(again.images["validation"].table) < 26
    os.truncate(home / "train-images.jsonl", 40)
    assert not open_corpus(data).cached
    (folder / "moved").mkdir()
    for path in (source, *folder.glob("?.png")):
        path.rename(folder / "moved" / path.name)
    moved = open_corpus(config(folder, folder / "moved" / "a.jsonl", validation=0.3).data)
    assert np.array_equal(moved.validation[:], again.validation[:])


def test_bad_lines_members_and_tokenizers(folder, tmp_path):
    (folder / "b.jsonl").write_text('{"parts": 7}\n{"parts": [{"image": ""}]}\n{"parts": ["x"]}\n')
    tar = shard(folder / "b.tar", ("1.json", b'{"parts": [{"image": "z.png"}]}'), ("2.txt", b"\xff"), ("3.json", b"{"))
    cut = shard(folder / "c.tar", ("1.txt", b"x" * 5000))
    os.truncate(cut, 2000)
    with pytest.raises(ConfigError) as error:
        open_corpus(config(folder, folder).data)
    rule = 'every line of a .jsonl must be a JSON object with a "text" string or "parts"; '
    inside = "the .json and .txt of a .tar must be UTF-8 and name files of that .tar; "
    part = 'is none: a part has a "text", "image" or "video" string, not'
    assert error.value.problems[:5] == [
        f'{rule}{folder}/b.jsonl:1 is none: it is {{"parts": 7}}; repair or delete the line',
        f'{rule}{folder}/b.jsonl:2 {part} {{"image": ""}}; repair or delete the line',
        f'{rule}{folder}/b.jsonl:3 {part} "x"; repair or delete the line',
        f"{inside}{tar}:1: there is no 'z.png' in it; repair it, or take it out of the .tar",
        f"{inside}{tar}:2: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; repair it, or take "
        "it out of the .tar"]
    assert len(error.value.problems) == 7 and f"{cut} is not (unexpected end of data)" in error.value.problems[6]
    conf = config(folder, lines(folder, *DOCUMENTS))
    with pytest.raises(ConfigError, match=r"got 257 and 257 \(data.tokenizer=bytes\); set model.vocab=258 or above"):
        open_corpus(conf.data, 257)


def test_the_id_of_images_in_a_tokenizer_file(folder):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "<image>": 2}, unk_token="a"))
    (folder / "with").mkdir()
    (folder / "without").mkdir()
    made.save(str(folder / "with" / "tokenizer.json"))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    made.save(str(folder / "without" / "tokenizer.json"))
    for name in ("with", "without"):
        (folder / name / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    source = lines(folder, ["r.png", "a", "g.png"])
    batch, _ = all_of(config(folder, source, tokenizer=str(folder / "with")))
    assert batch.tokens[0].tolist() == [2, 0, 2, 1, 0, 0, 0, 0] and batch.images.frames.tolist() == [[1, 1]]
    with pytest.raises(ConfigError) as error:
        open_corpus(config(folder, source, tokenizer=str(folder / "without")).data)
    assert error.value.problems == [
        "images need a token that stands where they are; that of data.tokenizer has no <image>, and a.jsonl has the "
        "image r.png; add it to the tokenizer"]


# Processes


def job(path: Path) -> tuple:
    return at(path), 4, "crop", 1, 1.0


@pytest.fixture
def decoders():
    made = Decoders()
    yield made
    made.close()
    assert not made.running


def test_processes_decode_as_this_one_does(folder, decoders):
    (folder / "x.png").write_text("x")
    paths = [folder / name for name in ("r.png", "g.png", "x.png", "b.png")] * 5
    assert not decoders.running  # before the first job
    for path, future in zip(paths, [decoders.submit(*job(path)) for path in paths], strict=True):
        one, other = future.result(60), decode(*job(path))
        assert type(one) is type(other) and np.array_equal(one, other)
    assert 1 <= len(decoders.running) <= images.WORKERS
    code = "import sys, moejax.data.images; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


def test_a_process_that_dies_is_started_again(folder, decoders):
    decoders.submit(*job(folder / "r.png")).result(60)
    for worker in list(decoders.running):
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    assert near(decoders.submit(*job(folder / "g.png")).result(60), GREEN)


def test_what_kills_its_process_twice_is_left_out(folder, decoders, monkeypatch):
    def killed(worker, job):
        worker.kill()
        return exchange(worker, job)

    exchange = images.exchange
    monkeypatch.setattr(images, "exchange", killed)
    assert decoders.submit(*job(folder / "g.png")).result(60) == "the process that decodes it has died of it twice"


def test_without_processes_this_one_decodes(folder, decoders, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert near(decoders.submit(*job(folder / "g.png")).result(60), GREEN)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "pass", "raise SystemExit(0)"])
def test_no_process_outlives_its_parent(folder, ending):
    code = f"""
import os, pickle, signal, sys
from moejax.data.images import Decoders, Ref
job = pickle.loads({pickle.dumps(job(folder / "r.png"))!r})
decoders = Decoders()
for future in [decoders.submit(*job) for _ in range(40)]:
    future.result(60)
print(*(worker.pid for worker in decoders.running), flush=True)
futures = [decoders.submit(*job) for _ in range(40)]
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    workers = list(map(int, done.stdout.split()))
    assert workers
    deadline = time.monotonic() + 10
    while (left := [worker for worker in workers if alive(worker)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left

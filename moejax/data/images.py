"""Files of images and videos to square arrays of pixels; what cannot be used is a reason, never an exception."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from moejax.config import refuse

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no others: some of Pillow's run programs
FILMS = {"format_whitelist": "mov,matroska,avi"}  # no others: playlists name further files
PIXELS = 2**26  # of one picture or frame; more is taken for an attack
SKIP = 10.0  # seconds of a video from which on to jump is quicker than to decode
WORKERS = 4  # processes at most
DIED = (OSError, EOFError, pickle.UnpicklingError)  # what one that has died makes of an exchange
Pixels = UInt8[np.ndarray, "frames S S 3"]


class Ref(NamedTuple):
    """Where an image is."""

    name: str  # as the document has it
    path: str  # of the file, or of the .tar that it is in
    offset: int  # bytes before it
    size: int  # in bytes; -1 is to the end of the file
    video: bool


def decode(ref: Ref, size: int, fit: str, frames: int, rate: float) -> Pixels | str:
    """A picture, or `rate` frames of a second of a video and at most `frames`, as squares; or why there is none."""
    try:
        if not os.path.isfile(ref.path):  # a pipe would never end
            return "there is no such file"
        with open(ref.path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about files that it can read nevertheless
            source = file
            if ref.size >= 0:
                file.seek(ref.offset)
                source = io.BytesIO(file.read(ref.size))
                if len(source.getbuffer()) < ref.size:
                    return "the .tar ends in the middle of it"
            return film(source, size, fit, frames, rate) if ref.video else picture(source, size, fit)[None]
    except UnidentifiedImageError:
        return f"it is not a picture ({', '.join(FORMATS)})"
    except Exception as error:  # whatever a library may raise about a stranger's file
        return str(error).split("\n")[0] or type(error).__name__


def picture(source: io.BufferedIOBase, size: int, fit: str) -> UInt8[np.ndarray, "S S 3"]:
    """Raises whatever Pillow does; ValueError if it has too many pixels."""
    image = Image.open(source, formats=FORMATS)
    check_size(*image.size)  # which nothing is decoded for
    if image.format in ("JPEG", "MPO"):  # shrinks as it decodes, to no less than twice the size
        width, height = scaled(*image.size, size, fit)
        image.draft(None, (2 * width, 2 * height))
    image.load()
    with contextlib.suppress(Exception):  # damage of the EXIF is none of the picture
        ImageOps.exif_transpose(image, in_place=True)
    return square(image, size, fit)


def check_size(width: int, height: int) -> None:
    if width * height > PIXELS or min(width, height) < 1:
        raise ValueError(f"it has {width} x {height} pixels; {PIXELS} are the most")


def scaled(width: int, height: int, size: int, fit: str) -> tuple[int, int]:
    """What a picture is resized to before its centre is cut out: its shorter side to `size`, or both sides."""
    if fit == "squash":
        return size, size
    shorter = min(width, height)
    return size * width // shorter, size * height // shorter


def square(image: Image.Image, size: int, fit: str) -> UInt8[np.ndarray, "S S 3"]:
    """The centre is cut out in the same step as it is resized: a line of 1 x 100000 pixels must not become large."""
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    clear = image.has_transparency_data
    if image.mode != (mode := "RGBA" if clear else "RGB"):
        image = image.convert(mode)
    width, height = scaled(*image.size, size, fit)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min((left + size) * across, image.width), min((top + size) * down, image.height))
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    if clear:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(image)


def film(source: io.BufferedIOBase, size: int, fit: str, frames: int, rate: float) -> Pixels | str:
    """Frames from the middles of equal parts of a video.  Raises whatever PyAV does."""
    try:
        import av  # an optional extra
    except ImportError:
        return "a video needs the optional package av, which is not installed; pip install av"
    try:
        container = av.open(source, options=FILMS, metadata_errors="replace")
    except av.FFmpegError:
        return f"it is not a video ({', '.join(ending[1:] for ending in VIDEOS)})"
    with container:
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            return "it has no video that is decoded here"
        check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1  # the processes are the threads
        start, length = span(container, stream)
        count = max(1, min(frames, round(length * rate)))
        times = [start + (part + 0.5) * length / count for part in range(count)]
        return np.stack([square(frame.to_image().rotate(frame.rotation, expand=True), size, fit)
                         for frame in shown(container, stream, times)])


def span(container: Any, stream: Any) -> tuple[float, float]:
    """The start and the length of a video in seconds; a file that does not say is read through, not decoded."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration or container.duration:  # the latter in microseconds
        return start, float(stream.duration * stream.time_base if stream.duration else container.duration / 1e6)
    last = max((one.pts + (one.duration or 0) for one in container.demux(stream) if one.pts is not None), default=0)
    container.seek(0)
    return start, max(float(last * stream.time_base) - start, 0.0)


def shown(container: Any, stream: Any, times: Sequence[float]) -> Iterator[Any]:
    """The frame on the screen at each of ascending times, one in memory at a time.  Raises ValueError without any."""
    coming = container.decode(stream)
    now, after = None, next(coming, None)
    for time in times:
        if after is not None and after.time < time - SKIP:
            container.seek(int(time / stream.time_base), stream=stream)  # to a key frame before
            coming = container.decode(stream)
            now, after = None, next(coming, None)
        while after is not None and after.time <= time:
            now, after = after, next(coming, None)
        if (frame := now or after) is None:
            raise ValueError("it has no frames")
        check_size(frame.width, frame.height)
        yield frame


def read_images(names: Sequence[str | Path], size: int, fit: str, frames: int, rate: float) -> list[Pixels]:
    """The images of files; one that ends as a video is one.  Raises ConfigError with all that cannot be used."""
    refs = [Ref(str(name), os.path.expanduser(name), 0, -1, str(name).lower().endswith(VIDEOS)) for name in names]
    found = [decode(ref, size, fit, frames, rate) for ref in refs]
    problems = [f"an image must be a file that can be read; {ref.name} is not ({why}); repair it, or name another"
                for ref, why in zip(refs, found, strict=True) if isinstance(why, str)]
    refuse(problems)
    return found


class Decoders:
    """Up to WORKERS processes that decode, each started when first needed.

    They run this file alone, not the main program as those of concurrent.futures do, and end when their input does.
    """

    def __init__(self):
        self.threads = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), "decode")
        self.own = threading.local()  # the process of each thread
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()  # of what is decoded here

    def submit(self, *job: Any) -> Future:
        return self.threads.submit(self.run, job)

    def run(self, job: tuple) -> Pixels | str:
        for _ in range(2):
            worker = getattr(self.own, "worker", None)
            try:
                worker = self.own.worker = worker or self.start()
            except OSError:  # there can be none
                with self.lock:
                    return decode(*job)
            try:
                return exchange(worker, job)
            except DIED:
                self.own.worker = self.end(worker)
        return "the process that decodes it has died of it twice"

    def start(self) -> subprocess.Popen:
        code = f"import sys; sys.path[:] = {sys.path!r}; from moejax.data.images import serve; serve()"
        # in a group of its own: Ctrl-C in the terminal is for the training process
        worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  process_group=0)
        self.running.add(worker)
        return worker

    def end(self, worker: subprocess.Popen) -> None:
        worker.kill()
        worker.communicate()  # closes both pipes, whatever is left in them
        self.running.discard(worker)

    def close(self) -> None:
        """What is not decoded yet never will be."""
        self.threads.shutdown(cancel_futures=True)
        for worker in list(self.running):
            self.end(worker)


def exchange(worker: subprocess.Popen, job: tuple) -> Pixels | str:
    pickle.dump(job, worker.stdin)
    worker.stdin.flush()
    return pickle.load(worker.stdout)


def serve() -> None:
    """What a process of `Decoders` does, until its input ends."""
    with os.fdopen(os.dup(1), "wb") as answers, open(0, "rb", closefd=False) as jobs:
        os.dup2(2, 1)  # nothing else may write between the answers
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                pickle.dump(decode(*pickle.load(jobs)), answers)
                answers.flush()
        os._exit(0)

#!/usr/bin/env python3
"""Render short texts into pictures, to train a model that reads them:

    python launch/render.py FOLDER [--size 64] [--train 20000] [--test 200] [--seed 0] [--once]

FOLDER/train.tar holds documents as pairs of 000001.png and 000001.json, FOLDER/test.jsonl holds one a line, with its
pictures in FOLDER/test.  About 3 in 4 are lines of Python's own standard library, the others formulas: set as in a
book in the picture, as LaTeX in the text.  No two documents have the same text.

Exit status: 0 if FOLDER holds the pictures, 2 if what was asked for is wrong; nothing is overwritten.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import random
import re
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import PIL
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image, ImageDraw, ImageFont

LEAST, LENGTH = 6, 26  # characters of a text
TRIES = 5000  # for a text that is new and fits
ROWS = 3
FORMULAS = 0.25
INK = 50  # of 255, which is the paper
COLUMNS = 8  # of a terminal, in whose cells the letters of sources stand
FONT, MATH, PITCH, MARGIN = 10, 14, 16, 2  # in 64ths of a picture's side
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
GREEK = [rf"\{name}" for name in "alpha beta gamma delta theta lambda mu pi sigma phi omega".split()]
LETTERS = list("abcdefghijkmnpqrstuvwxyz")
TERMS = 800  # parts that formulas are put together from; each is typeset once
MIDDLE = ["+", "-", "=", r"\leq", r"\to", r"\cdot", r"\approx", r"\in"]


class Piece(NamedTuple):
    """A typeset part of a formula."""

    ink: np.ndarray  # [row, column], 255 is full
    above: int  # rows above the baseline


def library() -> list[str]:
    """The lines of the standard library that are ASCII and not empty, with single spaces."""
    root, lines = sysconfig.get_path("stdlib"), []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                text = Path(folder, name).read_text("utf-8", "replace")
                lines += [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and line.isascii() and line.isprintable()]


def source(lines: Sequence[str], draw: random.Random) -> str:
    """Two or three rows from a random line on; broken where words end, or where the row does."""
    start, most = draw.randrange(len(lines)), draw.randint(2, ROWS)
    rows = []
    for line in lines[start:start + most]:
        row = ""
        for word in re.findall(rf" ?\w{{1,{COLUMNS - 1}}}|[^\w]", line):
            if len(row + word) > COLUMNS:
                rows.append(row)
                row = ""
            row += word if row else word.strip()
        rows.append(row)
    return "\n".join(row.strip() for row in rows[:most])


def term(draw: random.Random) -> str:
    """A part of a formula, such as \\frac{a+b}{c^2}."""
    def one() -> str:
        return draw.choice([draw.choice(LETTERS), draw.choice(LETTERS), draw.choice(GREEK), str(draw.randint(0, 9))])

    def raised() -> str:
        return draw.choice([one(), f"{draw.choice(LETTERS)}^{draw.randint(2, 9)}",
                            f"{draw.choice(LETTERS)}_{draw.choice('ijkn012')}"])

    def both() -> str:
        return draw.choice([raised(), f"{one()}{draw.choice('+-')}{one()}"])

    return draw.choice([
        raised, both, lambda: rf"\frac{{{both()}}}{{{both()}}}", lambda: rf"\sqrt{{{both()}}}",
        lambda: rf"\sum_{{{draw.choice('ijk')}=0}}^{{{draw.choice('nmN')}}} {raised()}",
        lambda: rf"\int_0^{draw.choice('1tT')} {raised()}",
        lambda: rf"\{draw.choice(['sin', 'cos', 'log'])} {raised()}",
        lambda: f"({both()})^{draw.randint(2, 5)}",
    ])()


class Setter:
    """Makes pictures of one size of texts."""

    def __init__(self, size: int):
        self.size, self.scale = size, size / 64
        self.margin, self.pitch = round(MARGIN * self.scale), PITCH * self.scale
        self.font = ImageFont.load_default(size=FONT * self.scale)
        if not isinstance(self.font, ImageFont.FreeTypeFont):
            raise SystemExit("render.py needs a Pillow with FreeType; this one has none: pip install --upgrade Pillow")
        self.math = MathTextParser("agg")
        self.piece = lru_cache(maxsize=None)(self.typeset)

    def source(self, parts: Sequence[str]) -> Image.Image | None:
        """Rows from the top left, letters in cells of one width; None for a single row."""
        if "\n" not in parts[0]:
            return None
        image = Image.new("L", (self.size, self.size), 255)
        draw, cell = ImageDraw.Draw(image), (self.size - 2 * self.margin) / COLUMNS
        for number, row in enumerate(parts[0].split("\n")):
            for column, letter in enumerate(row):
                at = self.margin + (column + 0.5) * cell, self.margin + number * self.pitch
                draw.text(at, letter, INK, self.font, anchor="ma")
        return image.convert("RGB")

    def typeset(self, text: str) -> Piece:
        large = text.replace(r"\frac", r"\dfrac")  # as LaTeX sets a formula on a line of its own
        bar = "|" * (text in MIDDLE)  # so that the picture of a minus reaches down to the baseline; it is cut off again
        found = self.math.parse(f"${bar}{large}$", dpi=72, prop=FontProperties(size=MATH * self.scale))
        ink = np.asarray(found.image)
        if bar:
            inked = np.flatnonzero(ink.any(0))
            ink = ink[:, inked[np.diff(inked, prepend=inked[0]).argmax()]:]  # after the widest gap
        return Piece(ink, round(found.height - found.depth))

    def formula(self, parts: Sequence[str]) -> Image.Image | None:
        """The parts side by side on one baseline, in the middle; None where the picture is too small."""
        pieces, gap = [self.piece(part) for part in parts], round(3 * self.scale)
        above = max(piece.above for piece in pieces)
        height = above + max(piece.ink.shape[0] - piece.above for piece in pieces)
        width = sum(piece.ink.shape[1] for piece in pieces) + gap * (len(pieces) - 1)
        if max(width, height) > self.size - 2 * self.margin:
            return None
        ink, left, top = np.zeros((self.size, self.size)), (self.size - width) // 2, (self.size - height) // 2
        for piece in pieces:
            upper, (rows, columns) = top + above - piece.above, piece.ink.shape
            ink[upper:upper + rows, left:left + columns] = piece.ink
            left += columns + gap
        return Image.fromarray((255 - ink / 255 * (255 - INK)).round().astype(np.uint8)).convert("RGB")


def formula(terms: Sequence[str], draw: random.Random) -> list[str]:
    """One term, or two with what stands between them."""
    return [draw.choice(terms)] + [draw.choice(MIDDLE), draw.choice(terms)] * draw.choice((0, 1, 1, 1))


def documents(size: int, count: int, seed: int) -> Iterator[tuple[str, str, Image.Image]]:
    """(kind, text, picture) of documents with different texts.

    Raises:
        ValueError: there are not that many.
    """
    draw, setter, lines, seen = random.Random(seed), Setter(size), library(), set()
    terms = sorted({term(draw) for _ in range(TERMS)})
    for number in range(count):
        kind = "formula" if draw.random() < FORMULAS else "source"
        for _ in range(TRIES):
            parts = formula(terms, draw) if kind == "formula" else [source(lines, draw)]
            text = " ".join(parts)
            if text not in seen and LEAST <= len(text) <= LENGTH and (image := getattr(setter, kind)(parts)):
                break
        else:
            raise ValueError(f"no new {kind} was found after {number:,} texts; ask for fewer")
        seen.add(text)
        yield kind, text, image


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def document(image: str, text: str) -> bytes:
    return json.dumps({"parts": [{"image": image}, {"text": text}]}).encode()


def write(folder: Path, size: int, train: int, test: int, seed: int) -> None:
    """train.tar, test.jsonl and test/ in a folder that is there."""
    made = documents(size, train + test, seed)
    (folder / "test").mkdir()
    with open(folder / "test.jsonl", "wb") as lines:
        for number, (kind, text, image) in zip(range(1, test + 1), made, strict=False):
            name = f"test/{number:06}-{kind}.png"
            (folder / name).write_bytes(png(image))
            lines.write(document(name, text) + b"\n")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number, (_, text, image) in enumerate(made, 1):
            for ending, data in (("png", png(image)), ("json", document(f"{number:06}.png", text))):
                member = tarfile.TarInfo(f"{number:06}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def held(folder: Path, meta: dict[str, Any]) -> str | None:
    """What a folder holds that is not empty: "" the same rendering, else what it is instead.  None if it is empty."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        other = json.loads((folder / "meta.json").read_text("utf-8"))
        complete = all((folder / name).exists() for name in ("train.tar", "test.jsonl", "test"))
    except (OSError, ValueError):
        return "other files"
    if not isinstance(other, dict) or not complete:
        return "other files"
    return ", ".join(f"{key} {other.get(key)}" for key in meta if other.get(key) != meta[key])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render short texts into pictures.")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--size", type=int, default=64, help="rows and columns of a picture, 48 to 1024 (64)")
    parser.add_argument("--train", type=int, default=20_000, help="documents to train on (20000)")
    parser.add_argument("--test", type=int, default=200, help="documents to test with (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--once", action="store_true", help="take what is there, whatever versions made it")
    args = parser.parse_args(argv)
    if not 48 <= args.size <= 1024 or args.train < 1 or args.test < 1:
        parser.error("SIZE is 48 to 1024, TRAIN and TEST are 1 or more")
    wanted = {"size": args.size, "train": args.train, "test": args.test, "seed": args.seed}
    meta = wanted | {"script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],
                     "python": platform.python_version(), "pillow": PIL.__version__,
                     "matplotlib": matplotlib.__version__}
    there = held(args.folder, wanted if args.once else meta)
    if there == "":
        if not args.once:
            print(f"render.py: {args.folder} holds these pictures already", file=sys.stderr)
        return 0
    if there:
        parser.error(f"pictures go into a new folder; {args.folder} holds {there}; name another, or remove it")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent, prefix=f".{args.folder.name}-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        try:
            write(whole, **wanted)
        except ValueError as error:
            parser.error(str(error))
        (whole / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        try:
            whole.rename(args.folder)  # whole or not at all
        except OSError:
            if held(args.folder, meta) != "":  # another process was not first
                raise
    print(f"render.py: {args.train:,} pictures to train on and {args.test:,} to test with in {args.folder}",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Let a trained run read the test pictures of render.py, and read them once more blacked out:

    python launch/transcribe.py RUN FOLDER/test.jsonl [--count 64] [--json]

Prints for each kind of text which share of its characters and of its texts is exact.  The difference between the two is
what the pictures are worth: blind, a model can only guess.  The first transcriptions go to RUN/samples.jsonl, for
`moejax report RUN`.

Exit status: 0, or 2 if what was asked for is wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import moejax
from moejax.config import ConfigError
from moejax.train.metrics import read_lines

PROMPT = "<image>"
GROUP = 32  # pictures read at once
KEPT = 24  # transcriptions in RUN/samples.jsonl


class Example(NamedTuple):
    """A document of one picture and its text."""

    kind: str  # what stands behind the number in the picture's name
    image: Path
    text: str


def examples(path: Path, count: int) -> list[Example]:
    """The first documents of a .jsonl; pictures lie relative to its folder.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    found = []
    try:
        for line in path.read_text("utf-8").splitlines()[:count]:
            first, second = json.loads(line)["parts"]
            image = path.parent / first["image"]
            if not image.is_file():
                raise ValueError(f"{image} is not there")
            found.append(Example(image.stem.partition("-")[2] or "text", image, second["text"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"transcription needs documents of a picture and its text; {path} has others "
                           f"({type(error).__name__}: {error}); make them with launch/render.py"]) from None
    if not found:
        raise ConfigError([f"transcription needs at least one document; {path} and --count {count} give none"])
    return found


def read(model: moejax.Model, images: Sequence[Path | np.ndarray], new: int) -> list[str]:
    """The transcription of every picture, in groups of one size, so that one program does them all."""
    texts = []
    for start in range(0, len(images), GROUP):
        group = list(images[start:start + GROUP])
        full = [[image] for image in group + group[-1:] * (GROUP - len(group))]
        texts += moejax.generate(model, [PROMPT] * GROUP, max_new_tokens=new, temperature=0.0, images=full)[:len(group)]
        print(f"transcribe.py: {len(texts)} of {len(images)}", file=sys.stderr)
    return texts


def score(truths: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """The shares that are exact: characters at their position in the truth, and whole texts."""
    right = sum(a == b for truth, text in zip(truths, texts, strict=True) for a, b in zip(truth, text, strict=False))
    whole = sum(truth == text for truth, text in zip(truths, texts, strict=True))
    return {"characters": right / sum(map(len, truths)), "texts": whole / len(truths)}


def scores(tests: Sequence[Example], seen: Sequence[str], blind: Sequence[str]) -> dict[str, Any]:
    """{kind or "all": {"count", "seen": shares, "blind": shares}}."""
    result = {}
    for kind in [*sorted({test.kind for test in tests}), "all"]:
        rows = [row for row, test in enumerate(tests) if kind in ("all", test.kind)]
        truths = [tests[row].text for row in rows]
        result[kind] = {"count": len(rows), "seen": score(truths, [seen[row] for row in rows]),
                        "blind": score(truths, [blind[row] for row in rows])}
    return result


def keep(path: Path, tests: Sequence[Example], seen: Sequence[str], blind: Sequence[str]) -> None:
    """Put the first transcriptions in the place of earlier ones; samples without pictures stay."""
    lines = [sample for sample in read_lines(path) if not sample.get("images")]
    for test, text, dark in list(zip(tests, seen, blind, strict=True))[:KEPT]:
        lines.append({"prompt": PROMPT, "images": [str(test.image.resolve())], "text": text, "blind": dark,
                      "truth": test.text})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def table(result: dict[str, Any]) -> str:
    lines = ["                 characters exact    whole texts exact",
             "kind      count    seen   blind        seen   blind"]
    for kind, each in result.items():
        cells = [each[how][what] for what in ("characters", "texts") for how in ("seen", "blind")]
        lines.append(f"{kind:8} {each['count']:6} {cells[0]:7.1%} {cells[1]:7.1%}     {cells[2]:7.1%} {cells[3]:7.1%}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Let a trained run read pictures, and read them blacked out.")
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("tests", metavar="FOLDER/test.jsonl", type=Path)
    parser.add_argument("--count", type=int, default=64, help="pictures, the first ones (64)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    try:
        tests = examples(args.tests, args.count)
        model = moejax.load(args.run)
        new = max(len(test.text.encode()) for test in tests) + 1  # and the end
        seen = read(model, [test.image for test in tests], new)
        blind = read(model, [np.zeros_like(np.asarray(Image.open(test.image).convert("RGB"))) for test in tests], new)
    except ConfigError as error:
        print("\n".join(f"transcribe.py: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    keep(args.run / "samples.jsonl", tests, seen, blind)
    result = scores(tests, seen, blind)
    print(json.dumps(result) if args.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

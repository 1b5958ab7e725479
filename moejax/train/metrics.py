"""The record of a run: one JSON object per step in `metrics.jsonl`, mirrored to TensorBoard.

The training loop writes it, in one process of the run; the report reads it.  A resume cuts the record back to the
checkpoint's step, so that however often a run was killed, the record is that of a run that was not.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from moejax.config import ConfigError

FILE = "metrics.jsonl"
FLUSH = 10  # seconds between looks that TensorBoard may take


class MetricsLog(AbstractContextManager):
    """Appends records to `run_dir/metrics.jsonl`, after `from_step`: what it holds from later, or half-written, is
    dropped.  A step's record comes before its checkpoint.  Without `write`, as in the processes of a group that leave
    it to the first, nothing is written.
    """

    def __init__(self, run_dir: Path, from_step: int = 0, write: bool = True):
        self.path, self.board = Path(run_dir) / FILE if write else None, None
        if not write:
            return
        self.pictures = Path(run_dir) / "tensorboard"
        self.pictures.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            cut_back(self.path, from_step)
        self.waiting = b""  # lines that could not be written yet
        self.begin_board(from_step + 1)

    def begin_board(self, step: int) -> None:
        """A new file of events, which hides those of `step` and later in the older ones."""
        # The library names its files by the second: without the count a quick restart would overwrite one.
        self.board = EventsWriter(str(self.pictures / "events"), f".{len(list(self.pictures.iterdir()))}")
        self.board.write_event(Event(step=step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
        self.flushed = time.monotonic()

    def write(self, record: dict[str, Any]) -> str | None:
        """It is on disk when this returns, or this returns what is wrong and it is written with a later record."""
        if self.path is None:
            return None
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)  # what is not finite is null
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting):]
            if "event" not in record:
                self.draw(record)
        except OSError as error:
            self.close()
            return str(error)
        return None

    def draw(self, record: dict[str, Any]) -> None:
        """To TensorBoard; after a failure into a new file."""
        if self.board is None:
            self.begin_board(record["step"])
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(record)
                  if isinstance(value, (int, float)) and tag != "step"]
        self.board.write_event(Event(step=record["step"], wall_time=time.time(), summary=Summary(value=values)))
        if time.monotonic() - self.flushed > FLUSH:
            self.board.flush()
            self.flushed = time.monotonic()

    def close(self, *error: object) -> None:
        board, self.board = self.board, None
        with suppress(OSError):
            if board is not None:
                board.close()

    __exit__ = close


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records by step, None for what was not finite; of a step done again after a rewind, the last one counts."""
    last: dict[int, dict[str, Any]] = {}
    for record in read_lines(Path(run_dir) / FILE):
        if "event" in record:
            last = {step: one for step, one in last.items() if step <= record["to"]}
        else:
            last[record["step"]] = record
    return list(last.values())


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """When the run went back to a checkpoint."""
    return [record for record in read_lines(Path(run_dir) / FILE) if "event" in record]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line is left out.  Raises ConfigError on damage before it."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        records = [parse(line) for line in file]
    if records and records[-1] is None:
        records.pop()
    if bad := [str(number) for number, record in enumerate(records, 1) if record is None]:
        raise ConfigError([f"every line of {path} is one JSON object; line {', '.join(bad)} is not; delete it"])
    return records


def cut_back(path: Path, last_step: int) -> None:
    """Rewrites the log up to the last record of `last_step`, without torn lines."""
    with path.open(encoding="utf-8", errors="replace") as old:
        lines = [(record, line.rstrip("\n") + "\n") for line in old if (record := parse(line)) is not None]
    while lines and ("event" in lines[-1][0] or lines[-1][0]["step"] > last_step):
        lines.pop()
    put(path, "".join(line for _, line in lines))


def put(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    fresh = path.with_name(f"{path.name}.tmp")
    with fresh.open("w", encoding="utf-8") as new:
        new.write(text)
        new.flush()
        os.fsync(new.fileno())
    os.replace(fresh, path)


def parse(line: str) -> dict[str, Any] | None:
    """The JSON object on a line; None when the line is torn."""
    with suppress(ValueError):
        if isinstance(record := json.loads(line), dict):
            return record
    return None


def tagged(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields by TensorBoard tag: one a layer; of shares per expert the busiest one's, in multiples of an even share."""
    for key, value in record.items():
        if not isinstance(value, list):
            yield key, value
            continue
        for layer, item in enumerate(value):
            if not isinstance(item, list):
                yield f"{key}/layer_{layer}", item
            elif item and None not in item:
                yield f"{key}_max/layer_{layer}", max(item) * len(item)

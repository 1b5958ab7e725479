"""What lies in the checkpoints of a run, whether it is as it was saved, and how two of them differ."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import P
from jax.sharding import Mesh, NamedSharding

from moejax.config import ConfigError
from moejax.train.checkpoint import Damaged, config_of, open_run, portions, read, read_manifest


def open_folder(run: str) -> ocp.CheckpointManager:
    return open_run(config_of(Path(run)).checkpoint, run)


def contents(run: str) -> list[dict[str, Any]]:
    """Step, tokens, arrays, bytes and time of every checkpoint, by their manifests alone, which may be damaged."""
    manager, rows = open_folder(run), []
    for step in sorted(manager.all_steps()):
        try:
            manifest = read_manifest(manager.directory, step)
        except Damaged as error:
            rows.append({"step": step, "damaged": error.what})
            continue
        arrays, saved = manifest["arrays"].values(), (manager.directory / str(step)).stat().mtime
        rows.append({"step": step, "tokens": manifest["tokens"], "arrays": len(arrays),
                     "bytes": sum(math.prod(one["shape"]) * np.dtype(one["dtype"]).itemsize for one in arrays),
                     "saved": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved))})
    return rows


def verify(run: str) -> dict[int, str]:
    """What is wrong with every checkpoint of a run, "" where it is as it was saved."""
    manager, found = open_folder(run), {}
    for step in sorted(manager.all_steps()):
        try:
            found[step] = ""
            for _ in pieces(manager, step, read_manifest(manager.directory, step)["arrays"]):
                pass
        except Damaged as error:
            found[step] = error.what
    return found


def diff(a: str, b: str) -> dict[str, Any]:
    """How the arrays of two checkpoints differ, bit by bit: each RUN, its newest step, or RUN@STEP.

    Returns {"a": RUN@STEP, "b": RUN@STEP, "arrays": number, "differ": {name: what}}.
    Raises ConfigError: there is no such checkpoint; Damaged: one of them is not as it was saved.
    """
    (first, step_a), (second, step_b) = pick(a), pick(b)
    arrays = read_manifest(first.directory, step_a)["arrays"]
    others = read_manifest(second.directory, step_b)["arrays"]
    differ = {name: f"only in {a if name in arrays else b}" for name in sorted(arrays.keys() ^ others.keys())}
    kinds = {name: [f"{one['dtype']}{one['shape']}" for one in (arrays[name], others[name])]
             for name in sorted(arrays.keys() & others.keys())}
    differ |= {name: f"{kind} and {other}" for name, (kind, other) in kinds.items() if kind != other}
    shared = {name: arrays[name] for name in kinds if name not in differ}
    for left, right in zip(pieces(first, step_a, shared), pieces(second, step_b, shared), strict=True):
        differ |= {name: what for name in left if (what := compare(left[name], right[name]))}
    return {"a": f"{first.directory}@{step_a}", "b": f"{second.directory}@{step_b}",
            "arrays": len(arrays.keys() | others.keys()), "differ": differ}


def pick(name: str) -> tuple[ocp.CheckpointManager, int]:
    run, _, step = name.rpartition("@")
    if not step.isdigit() or Path(name).is_dir():
        run, step = name, ""
    manager = open_folder(run)
    steps = sorted(manager.all_steps())
    if step and int(step) not in steps:
        raise ConfigError([f"RUN@STEP names a checkpoint; {run} has none of step {step}; "
                           f"it has steps {', '.join(map(str, steps))}"])
    return manager, int(step or steps[-1])


def pieces(manager: ocp.CheckpointManager, step: int, arrays: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays, checked, on this host, a portion at a time.  Raises Damaged."""
    place = NamedSharding(Mesh(jax.local_devices(backend="cpu")[:1], "one"), P())
    kinds = {name: jax.ShapeDtypeStruct(tuple(one["shape"]), one["dtype"], sharding=place)
             for name, one in arrays.items()}
    for some in portions(kinds):
        yield jax.device_get(read(manager, step, some)[0])


def compare(a: np.ndarray, b: np.ndarray) -> str:
    """What differs in words, "" if no bit does."""
    a, b = np.atleast_1d(a, b)
    other = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
    if not other.any():
        return ""
    place = np.unravel_index(int(np.argmax(other)), other.shape)
    with np.errstate(invalid="ignore"):
        far = np.abs(a[other].astype(np.float64) - b[other].astype(np.float64))
    far = np.max(far[~np.isnan(far)], initial=-np.inf)
    return (f"{other.sum()} of {other.size} entries differ, by at most {far if far >= 0 else np.nan:.3g}; "
            f"first at {list(map(int, place))}: {a[place]} and {b[place]}")

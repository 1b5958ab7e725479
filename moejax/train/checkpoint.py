"""Checkpoints of a run, by Orbax, independent of the layout that wrote them; damage is noticed.

A checkpoint is one flat dict of global arrays, by name, and a manifest: a checksum of every array, where the run was,
and its config.  Orbax itself does not notice a flipped bit.  The checksum is a sum of integers, so that it is the same
however an array is split; it is computed on the devices while the arrays are written.
"""

import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax import Array, P, lax
from jax.sharding import Mesh, NamedSharding

from moejax.config import Checkpoint, Config, ConfigError, from_json, leaves, to_json
from moejax.model.sharded import Sharded
from moejax.parallel import processes
from moejax.parallel.mesh import host_array
from moejax.train.fault import RunFailed, tell
from moejax.train.state import State

FILE = "process_{}.json"  # of the manifest
AT_ONCE = 1 << 28  # bytes
PARTS, LARGE = 8, 1 << 16
# Of errors that are not the fault of what is read.
NOT_DAMAGE = ("out of memory", "resource_exhausted", "permission_denied", "unauthenticated", "unavailable")
ASIDE = "aside"  # the subfolder for checkpoints that a run must not read again
# What may differ between a run and the config that resumes it: nothing of it changes what is learned.
FREE = ("name", "run_dir", "mesh.", "data.cache", "train.steps", "train.microbatches", "train.remat", "train.eval_",
        "train.log_every", "train.fault.", "checkpoint.", "model.moe.dispatcher")


class Position(NamedTuple):
    """Where a run is, beside its arrays."""

    step: int = 0
    offset: int = 0  # batches that were stepped over; step s reads batch s - 1 + offset


class Damaged(RuntimeError):
    """A checkpoint does not hold what was saved."""

    def __init__(self, folder: epath.Path, step: int, what: str):
        super().__init__(f"step {step} in {folder} is damaged: {what}")
        self.what = what


def checksums(arrays: dict[str, Array]) -> Array:
    """uint32 [arrays, devices]: what every device's shards add to the checksum of every array.

    The checksum is a sum over the bits of all entries, each mixed with its place.  Any one changed bit changes it,
    other damage but for a chance of 2^-32.  No device waits for another: a collective beside those of the next step
    could block both on a CPU.
    """
    parts = list(arrays.values())
    return summing(parts[0].sharding.mesh, tuple(x.sharding.spec for x in parts))(parts)


@cache
def summing(mesh: Mesh, specs: tuple[P, ...]) -> Callable[[list[Array]], Array]:
    """jitted: arrays placed so -> what `checksums` gives."""
    return jax.jit(jax.shard_map(
        lambda arrays: jnp.stack([share(x, spec, mesh) for x, spec in zip(arrays, specs, strict=True)])[:, None],
        mesh=mesh, in_specs=(list(specs),), out_specs=P(None, mesh.axis_names), check_vma=False))


def share(x: Array, spec: P, mesh: Mesh) -> Array:
    """What this device's shard adds; of equal copies only the first counts."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x if x.dtype == bool else lax.bitcast_convert_type(x, width)
    place, stride, split = jnp.zeros(x.shape, jnp.uint32), 1, set()
    for dim in reversed(range(x.ndim)):
        names = spec[dim] if dim < len(spec) else None
        names = () if names is None else (names,) if isinstance(names, str) else names
        shards, before = math.prod(mesh.shape[name] for name in names), lax.axis_index(names) if names else 0
        index = lax.broadcasted_iota(jnp.uint32, x.shape, dim) + jnp.uint32(before) * jnp.uint32(x.shape[dim])
        place += index * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim] * shards
        split |= set(names)
    copies = tuple(name for name in mesh.axis_names if name not in split)
    counts = lax.axis_index(copies) == 0 if copies else True
    # XLA sums all entries of an array one by one on a CPU; parts of it are added to each other as vectors, 4 x as fast.
    parts, dim = max((math.gcd(size, PARTS), -dim) for dim, size in enumerate(x.shape)) if x.size > LARGE else (1, 0)
    added = sum(mix(bit.astype(jnp.uint32) ^ mix(at + 1)) for bit, at in zip(
        *(jnp.split(each, parts, -dim) if x.ndim else [each] for each in (bits, place)), strict=True))
    return jnp.sum(added, dtype=jnp.uint32) * jnp.uint32(counts)


@cache
def adding(mesh: Mesh) -> Callable[[Array], Array]:
    """jitted: what `checksums` gives -> uint32 [arrays], the same in every process."""
    return jax.jit(partial(jnp.sum, axis=1, dtype=jnp.uint32), out_shardings=NamedSharding(mesh, P()))


def mix(x: Array) -> Array:
    """A bijection of 32 bits that spreads each (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class Manifest(ocp.AsyncCheckpointHandler):
    """Writes a JSON object that is made only when the arrays are being written, in every process its own."""

    async def async_save(self, directory: Any, args: "SaveManifest") -> list[ocp.future.Future]:
        async def write() -> None:
            text = json.dumps(args.make(), sort_keys=True)
            whole = json.dumps({"crc32": zlib.crc32(text.encode()), "of": text})
            (directory / FILE.format(jax.process_index())).write_text(whole)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    save = restore = None  # it is saved asynchronously only, and read by `read_manifest`


@ocp.args.register_with_handler(Manifest, for_save=True, for_restore=True)
@dataclass
class SaveManifest(ocp.args.CheckpointArgs):
    config: Config
    position: Position
    kinds: dict[str, dict[str, Any]]
    sums: Array  # of `checksums`

    def make(self) -> dict[str, Any]:
        """The manifest; waits for the checksums of this process's shards."""
        mine = np.sum([np.asarray(shard.data)[:, 0] for shard in self.sums.addressable_shards], 0, dtype=np.uint32)
        data, names = self.config.data, zip(self.kinds.items(), mine, strict=True)
        return self.position._asdict() | {"processes": jax.process_count(), "rng": random_kind(self.config),
            "config": json.loads(to_json(self.config)), "tokens": self.position.step * data.batch * data.sequence,
            "arrays": {name: kind | {"checksum": int(one)} for (name, kind), one in names}}


def read_manifest(folder: epath.Path, step: int) -> dict[str, Any]:
    """That of a step, its checksums summed over the processes that wrote.  Raises Damaged: not as it was written."""
    whole = read_part(folder, step, 0)
    others = [read_part(folder, step, process)["arrays"] for process in range(1, whole["processes"])]
    for name, one in whole["arrays"].items():
        one["checksum"] = sum(arrays[name]["checksum"] for arrays in (whole["arrays"], *others)) % 2**32
    return whole


def read_part(folder: epath.Path, step: int, process: int) -> dict[str, Any]:
    try:
        found = json.loads((folder / str(step) / "manifest" / FILE.format(process)).read_text())
        made = json.loads(found["of"]) if found["crc32"] == zlib.crc32(found["of"].encode()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(folder, step, f"its manifest cannot be read ({type(error).__name__})") from None
    if made.get("step") != step:
        raise Damaged(folder, step, "its manifest is not as it was written")
    return made


def flat(state: State) -> dict[str, Any]:
    """Every array of a state but the step, by name: "weights/embedding", "optimizer/0/mu/embedding"."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state._replace(step=None))}


def differences(there: Config, here: Config) -> list[str]:
    """What makes two configs learn something else, in words."""
    old, new = dict(leaves(there)), dict(leaves(here))
    return [f"{name} is {old[name][1]!r} there and {new[name][1]!r} here" for name in new
            if old[name][1] != new[name][1] and not name.startswith(FREE)]


def config_of(run_dir: Path) -> Config:
    """The config of a run folder.  Raises ConfigError where it is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ConfigError([f"what is meant is a run folder; {run_dir} holds no config.json; name another"])
    if '"model_type"' in path.read_text():
        raise ConfigError([f"what is meant is a run folder; {run_dir} is a Hugging Face checkpoint; make a run of it "
                           f"with moejax import {run_dir} RUN"])
    try:
        return from_json(path.read_text())
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def folder_of(rules: Checkpoint, run_dir: str | Path) -> epath.Path:
    """Where the checkpoints of a run lie.  Raises ConfigError where a library for such paths is missing."""
    folder = epath.Path(rules.folder or Path(run_dir).absolute() / "checkpoints")
    try:
        folder.exists()
    except ImportError as error:
        raise ConfigError([f"a bucket is reached by a library of its own; for {folder} it is missing ({error}); "
                           "install moejax[gcs] or moejax[s3]"]) from None
    return folder


def open_manager(folder: epath.Path, rules: Checkpoint | None) -> ocp.CheckpointManager:
    """Orbax's manager of a folder; only to read without rules."""
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what fails is told in our own words
    options = ocp.CheckpointManagerOptions(
        max_to_keep=rules and rules.keep, keep_period=(rules and rules.keep_every) or None, create=rules is not None,
        read_only=rules is None, save_root_metadata=False,
        # Otherwise a folder that cannot be made leaves threads that wait for it for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False))
    # The copies of an array share the writing where that is worth the cut.
    types = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)))
    # Random digits do not compress, and trying costs the step its cores.
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)
    return ocp.CheckpointManager(folder, options=options, item_handlers={"arrays": arrays, "manifest": Manifest()})


def open_run(rules: Checkpoint, run_dir: str | Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, to read.  Raises ConfigError where there are none."""
    folder = folder_of(rules, run_dir)
    manager = open_manager(folder, None) if folder.is_dir() else None
    if manager is None or not manager.all_steps():
        raise ConfigError([f"a run folder holds checkpoints; {run_dir} has none; train it first"])
    return manager


def read(manager: ocp.CheckpointManager, step: int, targets: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """Some arrays of a checkpoint, by name and placed as the targets say, and its manifest.  Raises Damaged: something
    is missing or not as it was saved; ConfigError: the checkpoint holds arrays of other names, shapes or types.
    """
    manifest = read_manifest(manager.directory, step)
    there = {name: (tuple(one["shape"]), one["dtype"]) for name, one in manifest["arrays"].items()}
    here = {name: (one.shape, str(one.dtype)) for name, one in targets.items()}
    if differ := [f"{name} is {there.get(name, 'missing')} there and {kind} here"
                  for name, kind in here.items() if there.get(name) != kind]:
        raise ConfigError([
            f"a checkpoint is read by the model that wrote it; step {step} in {manager.directory} is of another: "
            f"{'; '.join(differ[:3])}{' …' * (len(differ) > 3)}; undo the change of the config"])
    arrays, sums = {}, []
    try:
        for some in portions(targets):
            arrays |= load(manager.directory / str(step) / "arrays", some)
            sums.append(checksums({name: arrays[name] for name in some}))  # while the next are read
        found = dict(zip(targets, np.concatenate([adding(each.sharding.mesh)(each) for each in sums]), strict=True))
    except Exception as error:
        if isinstance(error, MemoryError) or any(word in str(error).lower() for word in NOT_DAMAGE):
            raise
        told = first_line(error).partition(" See full")[0]
        raise Damaged(manager.directory, step, f"it cannot be read ({type(error).__name__}: {told})") from None
    if wrong := [name for name in found if int(found[name]) != manifest["arrays"][name]["checksum"]]:
        raise Damaged(manager.directory, step, f"{len(wrong)} of its {len(found)} arrays are not as they were saved, "
                                               f"first {wrong[0]}")
    return arrays, manifest


def load(folder: epath.Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Arrays that Orbax saved, placed as the targets say.  Its own restore has JAX copy them: 0.4 of this bandwidth."""
    context = ocp.type_handlers.get_ts_context()
    stores = {name: ts.open(ocp.type_handlers.get_json_tspec_read(ocp.type_handlers.ParamInfo(
        name=name, parent_dir=folder), use_ocdbt=True), context=context, read=True) for name in targets}
    held = {name: one.sharding.addressable_devices_indices_map(one.shape) for name, one in targets.items()}
    shards, reads = {}, []
    for name, target in targets.items():
        store = stores[name].result()
        for index in held[name].values():
            if (name, str(index)) not in shards:
                memory = host_array(target.sharding.shard_shape(target.shape), target.dtype)
                shards[name, str(index)] = memory
                reads.append(ts.array(memory).write(store[index]))
    for each in reads:
        each.result()
    return {name: jax.make_array_from_single_device_arrays(target.shape, target.sharding, [
        jax.device_put(shards[name, str(index)], device) for device, index in held[name].items()])
        for name, target in targets.items()}


def portions(arrays: dict[str, jax.ShapeDtypeStruct]) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The arrays in order, at most AT_ONCE bytes, or one, at a time."""
    found, held = [], math.inf
    for name, one in arrays.items():
        held += one.size * one.dtype.itemsize
        if held > AT_ONCE:
            found.append({})
            held = one.size * one.dtype.itemsize
        found[-1][name] = one
    return found


def newest_good(manager: ocp.CheckpointManager, targets: dict[str, jax.ShapeDtypeStruct], say: Callable[[str], None],
                before: float = math.inf) -> tuple[int, dict[str, Array], dict[str, Any]] | None:
    """Step, arrays and manifest of the newest good one up to a step.  Raises ConfigError: all damaged, or as `read`."""
    steps = sorted((step for step in manager.all_steps() if step <= before), reverse=True)
    for step in steps:
        try:
            return step, *read(manager, step, targets)
        except Damaged as error:
            say(f"the checkpoint of {error}")
    if steps:
        raise ConfigError([f"a run goes on from a good checkpoint; all in {manager.directory} are damaged "
                           f"(steps {', '.join(map(str, reversed(steps)))}); bring one back from a copy, or set "
                           "run_dir to a new folder"])
    return None


class Checkpoints:
    """The checkpoints that a run writes; saving goes on in the background while the run continues."""

    def __init__(self, config: Config, say: Callable[[str], None] = tell):
        self.config, self.say = config, say
        self.folder = folder_of(config.checkpoint, config.run_dir)
        self.open()
        self.saving: int | None = None  # the step that is being written
        self.again, self.patience = 0, 0  # after a failure: the step of the next attempt, and steps between attempts

    def open(self) -> None:
        for half in self.folder.glob("*.orbax-checkpoint-tmp") if processes.first() else ():
            with suppress(OSError):  # as its threads may still write
                half.rmtree(missing_ok=True)  # of a save that was cut off; it may be what fills the disk
        self.manager = open_manager(self.folder, self.config.checkpoint)

    def newest(self) -> int | None:
        return self.manager.latest_step()

    def due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or (bool(self.patience) and step >= self.again)

    def save(self, state: State, position: Position) -> None:
        """Begin to write the state after position.step steps.  A failure is told, and tried again later."""
        arrays = flat(state)
        kinds = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in arrays.items()}
        manifest = SaveManifest(self.config, position, kinds, checksums(arrays))  # which the devices compute meanwhile
        try:
            self.settle()
            if self.patience:
                self.open()  # what is there now
            self.saving = position.step
            self.manager.save(position.step, force=True, args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(arrays), manifest=manifest))
        except Exception as error:
            self.failed(error, position.step)

    def check(self, step: int, wait: bool = False) -> None:
        """Tells, after a step, if the save in the background has failed; of one that goes on only if it shall wait."""
        try:
            if wait or (self.saving is not None and not self.manager.is_saving_in_progress()):
                self.settle()
        except Exception as error:
            self.failed(error, step)

    def settle(self) -> None:
        """Wait for what is being written; its errors come out here."""
        if self.saving is not None:  # the manager of a save that has failed repeats its error
            self.manager.wait_until_finished()
            self.saving, self.patience = None, 0

    def failed(self, error: Exception, step: int) -> None:
        """Raises RunFailed in a group of processes, which could not go on together."""
        which, self.saving = self.saving, None
        self.patience = min(max(2 * self.patience, 1), self.config.checkpoint.every)
        self.again = step + self.patience
        what = f"the checkpoint of step {which or step} could not be saved ({first_line(error)})"
        if jax.process_count() > 1:
            raise RunFailed(f"{what}; {self.last()}")
        with suppress(OSError):
            self.open()
        self.say(f"{what}; {self.last()}; trying again")

    def last(self) -> str:
        return f"the last good one is of step {self.newest()}" if self.newest() else "there is none before it"

    def finish(self, state: State, position: Position) -> None:
        """Write the last state, and wait until it is there.  Raises RunFailed after several attempts."""
        for pause in (0, 1, 5):
            time.sleep(pause)
            if self.newest() != position.step:
                self.save(state, position)
                self.check(position.step, wait=True)
            if self.newest() == position.step:
                return
        raise RunFailed(f"the checkpoint of step {position.step}, the last, could not be saved; {self.last()}; "
                        f"make room in {self.folder} and start the run again")

    def restore(self, abstract: State, before: float = math.inf) -> tuple[State, Position] | None:
        """The newest good state up to a step, or None if there is no checkpoint; what is newer is moved aside."""
        targets = flat(abstract)
        self.check(0, wait=True)
        if (found := newest_good(self.manager, targets, self.say, before)) is None:
            return None
        step, arrays, manifest = found
        if manifest["rng"] != (here := random_kind(self.config)):
            raise ConfigError([f"a run draws the same random numbers to its end; it began with {manifest['rng']}, and "
                               f"this process has {here}; set JAX's options jax_default_prng_impl and "
                               "jax_threefry_partitionable to what they were"])
        if differ := differences(from_json(json.dumps(manifest["config"])), self.config):
            raise ConfigError([f"a run goes on from its own checkpoints; those in {self.folder} are of another config "
                               f"({'; '.join(differ)}); set checkpoint.folder to another, or undo the difference"])
        if newer := [other for other in self.manager.all_steps() if other > step]:
            self.set_aside(newer)
        counted = jax.jit(lambda: jnp.int32(step), out_shardings=abstract.step.sharding)()
        state = jax.tree.unflatten(jax.tree.structure(abstract._replace(step=None)), [arrays[name] for name in targets])
        return state._replace(step=counted), Position(step, manifest["offset"])

    def set_aside(self, steps: list[int]) -> None:
        """Move checkpoints to where the run does not look."""
        for step in steps if processes.first() else ():
            place = self.folder / ASIDE / f"{step}-{time.time_ns()}"
            place.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(place)
            self.say(f"the checkpoint of step {step} is kept as {place}")
        processes.barrier("set aside")
        self.manager.reload()

    def close(self) -> None:
        try:
            self.settle()
        except Exception as error:
            self.say(f"the last checkpoint could not be saved ({first_line(error)})")
        with suppress(Exception):  # told already
            self.manager.close()


def random_kind(config: Config) -> dict[str, Any]:
    """What, with the step, gives the random numbers of a run."""
    return {"seed": config.train.seed, "impl": str(jax.random.key_impl(jax.random.key(0))),
            "partitionable": jax.config.jax_threefry_partitionable}


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def write_weights(config: Config, weights: dict[str, Array]) -> None:
    """A checkpoint of weights alone, at step 0.  Raises RunFailed where it could not be written."""
    checkpoints = Checkpoints(config)
    checkpoints.save(State(None, weights, None, None), Position())
    checkpoints.close()
    if checkpoints.newest() != 0:
        raise RunFailed(f"the weights could not be written to {checkpoints.folder}; make room and try again")


def restore_weights(run_dir: Path, sharded: Sharded, say: Callable[[str], None] = tell,
                    rules: Checkpoint | None = None,
                    targets: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, Array]:
    """The newest good weights of a run, on any mesh: the model's, or those that the targets say.  The rules are the
    run's own, where they are not those of the model's config.  Raises ConfigError where there is no good checkpoint.
    """
    targets = targets or {name: jax.ShapeDtypeStruct(sharded.shapes[name], jnp.float32, sharding=place)
                          for name, place in sharded.shardings.items()}
    manager = open_run(rules or sharded.config.checkpoint, run_dir)
    _, values, _ = newest_good(manager, {f"weights/{name}": target for name, target in targets.items()}, say)
    manager.close()
    return {name.removeprefix("weights/"): value for name, value in values.items()}

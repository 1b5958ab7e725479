"""Published checkpoints in and out: safetensors files, tensor by tensor, straight onto the devices of a mesh."""

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import CROSSED, ConfigError, Model, refuse
from moejax.data.tokenizer import read_json
from moejax.hf.names import FAMILIES, WHOLE, Entry, describe, model_of, unlike
from moejax.hf.reading import Reader
from moejax.hf.safetensors import DTYPES, File, shards, write
from moejax.model import transformer
from moejax.model.sharded import Sharded
from moejax.parallel import axes as rules
from moejax.parallel.mesh import host_array

INDEX = "model.safetensors.index.json"
ORIGIN = "huggingface.json"  # in the run folder: the config it came with, and the type of every tensor
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
          "generation_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
          "preprocessor_config.json", "processor_config.json")
SHARD = 2 << 30  # bytes of a file of an export, at most, unless one tensor is larger
FLOAT16 = 65520  # and above is rounded to infinity
IN_PLACE = ("cpu",)  # platforms whose devices work in the memory of the host
ROWS = 16  # of a matrix that are transposed at once: a cache line of what is written
THREADS = min(os.cpu_count() or 1, 16)
UNUSED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")  # written by older versions
READS = re.compile(r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$")  # the rest of CLIP and SigLIP
SEES = "vision_model."  # begins the names of an encoder's tensors, in most versions
TIED = ("lm_head.weight", "lm_head.additional_fc.weight")
put = jax.jit(partial(jax.lax.dynamic_update_slice_in_dim, axis=0), donate_argnums=0)  # array, layer, its place


class Tensor(NamedTuple):
    """Of a checkpoint: our weight, and along each of its axes the part that the tensor holds."""

    entry: Entry
    weight: str
    part: dict[str, range]

    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(len(self.part[axis]) for axis in dim) for dim in groups(self.entry.axes))

    def order(self) -> list[str]:
        """The axes of our weight, as they follow in the tensor."""
        return [axis for dim in groups(self.entry.axes) for axis in dim]


class Checkpoint:
    """A folder of safetensors files, checked as a whole before anything is read: a ConfigError says all its faults."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_json(folder / "config.json")
        name = self.config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES | WHOLE:
            raise ConfigError([f"model_type is one of {', '.join(FAMILIES | WHOLE)}; {folder / 'config.json'} has "
                               f"{name!r}"])
        if found := self.config.get("quantization_config"):
            raise ConfigError([f"weights are float32, float16 or bfloat16; those of {folder} are quantised "
                               f"({found!r:.80}); take a checkpoint that is not, or dequantise it first"])
        self.family = FAMILIES[WHOLE.get(name, name)]
        if self.family.encoder():
            self.config = alone(self.config, WHOLE.get(name, name))
        read = self.family.reader(self.config, "vision_config." * (name in WHOLE))
        self.model = model_of(self.family, read)
        if read.problems:
            raise ConfigError(read.problems)
        if self.model.vision:
            kind, *parts = self.model.vision.split()
            parts = dict(part.split("=") for part in parts) | prepared(folder)
            self.model = replace(self.model, vision=" ".join([kind, *map("=".join, parts.items())]))
        self.files = self.open()

    def open(self) -> dict[str, File]:
        """Name -> the open file that holds the tensor."""
        problems, found = [], {}
        for path in self.paths():
            try:
                file = File(path)
            except (ValueError, OSError) as error:
                problems.append(f"{path} is not a whole safetensors file ({error}); fetch it again")
                continue
            problems += [f"a tensor lies in one file; {name} is in {found[name].path} and in {path}; fetch them again"
                         for name in sorted(found.keys() & file.tensors.keys())]
            found |= dict.fromkeys(file.tensors, file)
        refuse(problems)
        return found

    def paths(self) -> list[Path]:
        single, index = self.folder / "model.safetensors", self.folder / INDEX
        if index.is_file():
            where = read_json(index).get("weight_map")
            names = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
            problems = [f"{index} names the files of the weights beside it; {name} is none; fetch it again"
                        for name in names or ["nothing"]
                        if name != Path(name).name or not (self.folder / name).is_file()]
            refuse(problems)
            return [self.folder / name for name in names]
        if single.is_file():
            return [single]
        if pickled := sorted(x.name for x in self.folder.glob("*") if x.suffix in (".bin", ".pt", ".pth", ".ckpt")):
            raise ConfigError([f"weights are read from safetensors; {self.folder} has {', '.join(pickled)}, which are "
                               "pickle files: reading one can run any code in it; convert it to safetensors where you "
                               "trust it"])
        raise ConfigError([f"a checkpoint has model.safetensors or {INDEX}; {self.folder} has neither"])

    def origin(self) -> dict[str, Any]:
        """What ORIGIN keeps of it."""
        return {"config": self.config, "dtypes": {name: file.tensors[name].dtype for name, file in self.files.items()}}

    def check(self, wanted: Mapping[str, Tensor]) -> list[str]:
        """Raises ConfigError on tensors that are missing, too many or of another shape; returns those left out."""
        wrong, left, layers = [], [], self.model.layers
        for name in sorted(self.files.keys() | wanted.keys()):
            shape = wanted[name].shape() if name in wanted else ()
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            later = layer and layers <= int(layer[1]) < layers + (self.config.get("num_nextn_predict_layers") or 0)
            other = (name in TIED and self.model.tied) or (self.family.encoder() and READS.match(name))
            found = self.files[name].tensors[name] if name in self.files else None
            if found is None:
                wrong.append(f"{name} of shape {list(shape)} is missing")
            elif name not in wanted and (later or other or UNUSED.search(name)):
                left.append(name)
            elif name not in wanted:
                wrong.append(f"{name} is there, and this model has no such tensor")
            elif found.shape != shape:
                wrong.append(f"{name} must have shape {list(shape)}; it has {list(found.shape)}")
            elif found.dtype not in DTYPES:
                wrong.append(f"{name} must be {', '.join(DTYPES)}; it is {found.dtype}")
        if wrong:
            raise ConfigError([f"{what}, in {self.folder}" for what in wrong])
        return left

    def weights(self, sharded: Sharded) -> tuple[dict[str, Array], list[str]]:
        """All weights on the mesh, float32, and the names of tensors that were left out."""
        wanted, by_weight = tensors(entries_of(self.config, self.files), sharded), {name: [] for name in sharded.axes}
        left = self.check(wanted)
        for name, tensor in wanted.items():
            by_weight[tensor.weight].append((name, tensor))
        with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(2) as some:  # two weights at a time
            placed = some.map(lambda weight: self.place(sharded, weight, by_weight[weight], pool), by_weight)
            return dict(zip(by_weight, placed, strict=True)), left

    def place(self, sharded: Sharded, weight: str, parts: list[tuple[str, Tensor]], pool: ThreadPoolExecutor) -> Array:
        shape, sharding = sharded.shapes[weight], sharded.shardings[weight]
        made, held = {}, sharding.addressable_devices_indices_map(shape)

        def read(ranges: Mapping[str, range]) -> np.ndarray:
            # Zeros, and they stay so in the balancing bias of a router that has none.
            out = host_array(tuple(map(len, ranges.values())), np.float32)
            list(pool.map(lambda part: self.fill(out, ranges, *part), parts))
            return out

        distinct = {str(index): (index, device) for device, index in held.items()}  # several devices may hold the same
        for key, (index, device) in distinct.items():
            ranges = {axis: range(*one.indices(size))
                      for axis, one, size in zip(rules.names(sharded.axes[weight]), index, shape, strict=True)}
            if device.platform in IN_PLACE or "layer" not in ranges:
                made[key] = read(ranges)
                continue
            out = jnp.zeros([len(one) for one in ranges.values()], jnp.float32, device=device)
            for at, layer in enumerate(ranges["layer"]):  # each is gone from the host before the next is read
                one = jax.device_put(read(ranges | {"layer": range(layer, layer + 1)}), device)
                out = put(out, jax.block_until_ready(one), at)
            made[key] = out
        return jax.make_array_from_single_device_arrays(shape, sharding, [
            jax.device_put(made[str(index)], device) for device, index in held.items()])

    def fill(self, out: np.ndarray, ranges: Mapping[str, range], name: str, tensor: Tensor) -> None:
        """The part of our block, of these ranges, that one tensor holds."""
        order, file, at, cuts = tensor.order(), self.files[name], [], {}
        for axis, held in ranges.items():
            there = tensor.part[axis]
            begin, end = max(held.start, there.start), min(held.stop, there.stop)
            if begin >= end:
                return
            at.append(slice(begin - held.start, end - held.start) if axis in order else begin - held.start)
            cuts[axis] = slice(begin - there.start, end - there.start)
        value = file.view(name).reshape([len(tensor.part[axis]) for axis in order])
        cuts |= {axis: places[cuts[axis]] for axis, places in pairs(tensor, self.model).items()}
        value = value[tuple(cuts[axis] for axis in order)]
        copy(out[tuple(at)], value.transpose([order.index(axis) for axis in ranges if axis in order]))
        file.leave(name)


def entries_of(published: Mapping[str, Any], names: Iterable[str] = ()) -> tuple[Entry, ...]:
    """Those of a family as a checkpoint with this config.json and these tensors, where it has some, spells them."""
    family = FAMILIES[published["model_type"]]
    entries, values, names = family.entries, family.reader(published).values, list(names)
    if family.encoder() and names and not any(name.startswith(SEES) for name in names):
        entries = tuple(entry._replace(there=entry.there.removeprefix(SEES)) for entry in entries)
    if not published.get("rope_interleave", True):
        entries = tuple(entry._replace(axes=entry.axes.replace("~", "")) for entry in entries)
    count, more = (values.get(key) or 0 for key in ("vocab_size", "additional_vocab_size"))
    rows = {"vocab_size": range(count), "additional_vocab_size": range(count, count + more)}
    return tuple(entry._replace(rows=rows.get(entry.rows)) for entry in entries)


def alone(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The config.json of an image encoder by itself, or the half of CLIP or SigLIP that sees.  Raises ConfigError."""
    known, read = {"model_type": kind, "architectures": [FAMILIES[kind].architecture]}, Reader(config)
    if config["model_type"] == kind:
        return config | known
    found = read("vision_config_dict", {}) or read("vision_config", {})
    if read.problems:
        raise ConfigError(read.problems)
    return found | known | {key: config[key] for key in ("dtype", "torch_dtype") if key in config}


def prepared(folder: Path) -> dict[str, str]:
    """How a checkpoint's images are made ready, as `model.vision` says it.  Raises ConfigError."""
    found = next((read_json(folder / name) for name in BESIDE[-2:] if (folder / name).is_file()), {})
    found = found["image_processor"] if isinstance(found.get("image_processor"), dict) else found
    if found.get("do_rescale") is False or found.get("rescale_factor") not in (None, 1 / 255):
        raise ConfigError([f"bytes of pixels are divided by 255 here; {folder} has do_rescale "
                           f"{found.get('do_rescale')} and rescale_factor {found.get('rescale_factor')}"])
    if found.get("do_normalize") is False:
        found |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    told = {name: str(found[f"image_{name}"]).strip("[]").replace(" ", "") for name in ("mean", "std")
            if found.get(f"image_{name}") is not None}
    return told | ({"fit": "crop" if found["do_center_crop"] else "squash"} if "do_center_crop" in found else {})


@cache
def groups(axes: str) -> list[list[str]]:
    """The axes of every dimension of a tensor: "(heads head) embed" is [["heads", "head"], ["embed"]]."""
    parts = re.findall(r"\([^)]*\)|\S+", axes.replace("~", ""))
    return [[] if part == "1" else part.strip("()").split() for part in parts]


def pairs(tensor: Tensor, model: Model) -> dict[str, np.ndarray]:
    """Of an axis marked ~: where the entries of our weight are in the tensor, which ends in pairs of neighbours."""
    found = {}
    for axis in re.findall(r"(\w+)~", tensor.entry.axes):
        size, turned = len(tensor.part[axis]), model.latent[2]
        found[axis] = np.r_[:size - turned, size - turned:size:2, size - turned + 1:size:2]  # … 0 2 4 … 1 3 5 …
    return found


def copy(out: np.ndarray, value: np.ndarray) -> None:
    """out[...] = value, where out is zeros, float32; a transposed matrix by blocks of rows, several times as fast."""
    if value.dtype == DTYPES["BF16"] and out.ndim:  # the upper halves of float32
        out, value = out.view(np.uint16)[..., sys.byteorder == "little"::2], value.view(np.uint16)
    if value.ndim < 2 or value.strides[-1] == value.itemsize:
        out[...] = value
        return
    if value.ndim == 3 and value.strides[1] == value.shape[2] * value.strides[2] and (
            out.strides[1] == out.shape[2] * out.strides[2]):
        out, value = (x.reshape(len(x), -1) for x in (out, value))  # still views
    for j in range(0, value.shape[-1], ROWS):
        out[..., j:j + ROWS] = value[..., j:j + ROWS]


def tensors(entries: Sequence[Entry], sharded: Sharded) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of this model."""
    found, numbered = {}, stacks(sharded.config.model)
    for entry in entries:
        inside = next((kind for kind in numbered if f"{{{kind}}}" in entry.there), None)
        for prefix, layers in numbered[inside].items() if inside else [("", [0])]:
            weight = f"{prefix}.{entry.here}".lstrip(".")
            order = [axis for dim in groups(entry.axes) for axis in dim]
            named = {"layer": inside, "expert": "{expert}" in entry.there, "gate": entry.gate is not None}
            named = [axis for axis, there in named.items() if there]  # axes along which the name has a number
            if weight not in sharded.axes or sorted([*order, *named]) != sorted(rules.names(sharded.axes[weight])):
                continue
            part = dict(zip(rules.names(sharded.axes[weight]), map(range, sharded.shapes[weight]), strict=True))
            if entry.rows is not None:
                part[order[0]] = entry.rows
            if not all(part.values()):
                continue
            for row, layer in enumerate(layers):
                for expert in part["expert"] if "expert" in named else [0]:
                    at = {"layer": row, "expert": expert, "gate": entry.gate}
                    name = entry.there.format(expert=expert, **{inside or "layer": layer})
                    found[name] = Tensor(entry, weight, part | {axis: range(at[axis], at[axis] + 1) for axis in named})
    return found


def stacks(model: Model) -> dict[str, dict[str, list[int]]]:
    """By what stands for the number in names there: prefix of our stacked weights -> the numbers in the stack."""
    layers, letters = transformer.stacks(model), model.layer_letters()
    crossed = [layer for layer, letter in enumerate(letters) if letter in CROSSED]
    told, look = model.encoder(), model.looks()
    return {"layer": layers,
            "cross": {f"{prefix}.cross": [crossed.index(layer) for layer in some]
                      for prefix, some in layers.items() if some[0] in crossed},
            "block": {"vision.encoder.block": list(range(told.layers))} if told else {},
            "depth": {"vision.resampler.layer": list(range(look.depth))} if look and look.latents else {}}


def lacks(published: Mapping[str, Any], model: Model) -> list[str]:
    """What a config.json does not say of this model, apart from what is of training."""
    family = FAMILIES[published["model_type"]]
    read = family.reader(published)
    return unlike(model, model_of(family, read)) + read.problems


def family_of(model: Model, longest: int) -> dict[str, Any]:
    """The config.json of the family that can express a model.  Raises ConfigError: what the nearest one lacks."""
    found = [{"model_type": name, "architectures": [family.architecture], **describe(model, family, longest)}
             for name, family in FAMILIES.items()]
    nearest = min(found, key=lambda published: len(lacks(published, model)))
    if missing := lacks(nearest, model):
        raise ConfigError([f"an export is of a family that can express the model ({', '.join(FAMILIES)}); "
                           f"{nearest['model_type']} comes nearest, and cannot express {what}; train a model without "
                           "it" for what in missing])
    return nearest


def export(sharded: Sharded, weights: Mapping[str, Array], folder: Path, published: dict[str, Any],
           dtypes: Mapping[str, str], default: str) -> dict[str, Any]:
    """A model as files of at most SHARD bytes, and `published` as config.json, whose model_type names the family.

    The dtypes are keys of DTYPES, by tensor.  Returns {"tensors": number, "bytes": of all}.  Raises ConfigError where a
    number is too large for float16.
    """
    wanted = tensors(entries_of(published, dtypes), sharded)
    kinds = {name: dtypes.get(name, default) for name in wanted}
    sizes = {name: math.prod(one.shape()) * DTYPES[kinds[name]].itemsize for name, one in wanted.items()}
    large = {name: float(jnp.max(jnp.abs(weights[name])))
             for name in sorted({one.weight for key, one in wanted.items() if kinds[key] == "F16"})}
    refuse([f"float16 holds numbers below {FLOAT16}; {name} goes up to {most:.6g}; export as bfloat16 or float32"
            for name, most in large.items() if FLOAT16 <= most < math.inf])
    files, where = list(shards(sizes, SHARD)), {}
    for i, names in enumerate(files, 1):
        path = folder / ("model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors")
        write(path, {name: (kinds[name], wanted[name].shape()) for name in names},
              lambda name: fetch(weights, wanted[name], sharded.config.model))
        where |= dict.fromkeys(names, path.name)
    if len(files) > 1:
        (folder / INDEX).write_text(json.dumps(
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(published, indent=1) + "\n")
    return {"tensors": len(wanted), "bytes": sum(sizes.values())}


def fetch(weights: Mapping[str, Array], tensor: Tensor, model: Model) -> np.ndarray:
    """One tensor as it is published, float32."""
    order, part = tensor.order(), tensor.part
    value = np.asarray(weights[tensor.weight][tuple(
        slice(one.start, one.stop) if axis in order else one.start for axis, one in part.items())])
    held = [axis for axis in part if axis in order]
    value = value.transpose([held.index(axis) for axis in order])
    for axis, places in pairs(tensor, model).items():
        value = np.take(value, np.argsort(places), order.index(axis))
    out = np.zeros(value.shape, np.float32)
    copy(out, value)
    return out.reshape(tensor.shape())

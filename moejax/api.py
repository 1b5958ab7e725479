"""What `import moejax` offers: load a run and use it."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Integer, Num

from moejax import config as configs
from moejax.config import Config, ConfigError, Data, require
from moejax.data.batch import Images
from moejax.data.images import read_images
from moejax.data.tokenizer import IMAGE, TOKENIZER_FILE, ByteTokenizer, FileTokenizer, open_tokenizer
from moejax.hf import convert, safetensors
from moejax.hf.names import FAMILIES
from moejax.model.sharded import Sharded, on_mesh
from moejax.model.transformer import Output
from moejax.model.vision import Features
from moejax.parallel import axes, mesh as meshes
from moejax.serve.generate import generate_tokens
from moejax.train.begin import adopt
from moejax.train.checkpoint import folder_of, restore_weights, write_weights
from moejax.train.fault import tell

IMPORT, EXPORT = "a checkpoint is imported into a new run folder", "an export is a new folder"


class Model:
    """A trained model on a mesh: `model(tokens)` gives its Output."""

    def __init__(self, sharded: Sharded, weights: dict[str, Array], folder: Path | None = None):
        self.sharded, self.weights, self.config, self.folder = sharded, weights, sharded.config, folder

    @cached_property
    def tokenizer(self) -> ByteTokenizer | FileTokenizer:
        """That of the folder that the model was loaded from, if it holds one, else that of data.tokenizer.

        Raises ConfigError: there is none, or it cannot be used.  A model without one still takes tokens.
        """
        own = self.folder / TOKENIZER_FILE if self.folder else None
        name = str(own) if own and own.is_file() else self.config.data.tokenizer
        return open_tokenizer(name, self.config.model.vocab)

    def prompt(self, text: str, chat: bool = False) -> list[int]:
        """The ids before an answer: of a text, whose <image>s are images if the model sees, or of a user's message."""
        if chat:
            return self.tokenizer.chat([{"role": "user", "content": text}]).tolist()
        first, *rest = text.split(IMAGE) if self.config.model.cross and self.tokenizer.image is not None else [text]
        return [*self.tokenizer.prompt(first).tolist(),
                *(each for piece in rest for each in (self.tokenizer.image, *self.tokenizer.encode(piece).tolist()))]

    def pictures(self, prompts: Sequence[list[int]], images: Sequence[Sequence[Any]]) -> Images | None:
        """The images of prompts (files, or uint8 "S S 3" or "frames S S 3") as a batch has them; None without any.

        Raises ConfigError: a prompt has not one <image> for every image, a file is no image, or the model sees nothing.
        """
        model, images = self.config.model, [*images, *[()] * (len(prompts) - len(images))]
        require({f"images are for a model that sees; model.vision is {model.vision!r} and model.cross {model.cross!r}; "
                 "leave the images out": model.cross or not any(images)})
        if not model.cross:
            return None
        places = [[at for at, each in enumerate(ids) if each == self.tokenizer.image] for ids in prompts]
        require({f"a prompt has an {IMAGE} for every image; prompt {i} has {len(at)} for {len(given)}; write {IMAGE} "
                 "where an image belongs, or give more": len(at) == len(given)
                 for i, (at, given) in enumerate(zip(places, images, strict=True))})
        most, length = max(map(len, images)), max(map(len, prompts))
        if not most:
            return None
        told, rules = model.encoder(), model.looks()
        names = [each for given in images for each in given if not isinstance(each, np.ndarray)]
        files = iter(read_images(names, told.size, told.fit, rules.frames, self.config.data.rate))
        pixels = np.zeros((len(prompts), most, rules.frames, told.size, told.size, 3), np.uint8)
        frames, looks = np.zeros((len(prompts), most), np.int32), np.zeros((len(prompts), length, most), bool)
        for row, (given, at) in enumerate(zip(images, places, strict=True)):
            for i, each in enumerate(given):
                shown = each.reshape(-1, *each.shape[-3:]) if isinstance(each, np.ndarray) else next(files)
                pixels[row, i, :len(shown)], frames[row, i] = shown, len(shown)
                end = at[i + 1] if rules.kind == "last" and i + 1 < len(at) else length
                looks[row, at[i]:end, i] = True
        return Images(pixels, frames, looks)

    def __call__(self, tokens: Integer[np.ndarray | Array, "B T"], images: Images | None = None) -> Output:
        """Output(logits "B T V", hidden "B T D", routing "L B T A", losses) as in evaluation.

        Raises ConfigError: B is not a multiple of the mesh's batch shards, or T none of the routing group.
        """
        model, length, group = self.config.model, tokens.shape[1], self.config.model.moe.group or 1
        require({
            "tokens are for a model with layers; this is an image encoder alone; use see": model.layers,
            "images are for a model that sees; model.cross is empty; leave them out": images is None or model.cross,
            **self.shared_out("sequences", tokens),
            f"the number of tokens must be a multiple of model.moe.group, or below it; got {length} and {group}; pad "
            "the sequences": length < group or length % group == 0})
        return self.sharded.forward(self.weights, *on_mesh(self.sharded.mesh, (np.asarray(tokens, np.int32), images)))

    def see(self, pixels: Num[np.ndarray | Array, "N S S 3"]) -> Features:
        """Features(hidden "N P W", pooled "N W" or None) of images by themselves, as their encoder has them.

        `pixels` are uint8, or floats that are normalised already, of the size that model.vision says.  Raises
        ConfigError: there is no encoder, the images have another size, or N is not a multiple of the batch shards.
        """
        told = self.config.model.encoder()
        require({"images are for a model that sees; model.vision is empty": told})
        shape, found = (told.size, told.size, 3), tuple(pixels.shape[1:])
        require({f"images have shape {shape} as model.vision says; got {found}; resize them": shape == found,
                 **self.shared_out("images", pixels)})
        return self.features(self.weights, on_mesh(self.sharded.mesh, np.asarray(pixels)))

    def shared_out(self, what: str, rows: Any) -> dict[str, bool]:
        """The rule that every batch shard has as many rows."""
        count, shards = len(rows), self.config.mesh.batch_shards()
        return {f"the number of {what} must be a multiple of the mesh's batch shards; got {count} and {shards}; pad "
                "them, or load with mesh.data=1": count % shards == 0}

    @cached_property
    def features(self) -> Any:
        """`see` as a program of weights and pixels on the mesh."""
        told, rows = self.config.model.encoder(), axes.rows(self.sharded.mesh.shape)

        def device(values: dict[str, Array], pixels: Array) -> Features:
            return self.sharded.build(values).vision.encoder(pixels, self.sharded.run(sequence=False, remat="none"))

        out = Features(rows, rows if told.kind == "clip" or told.pool else None)
        return jax.jit(self.sharded.program(device, (rows,), out))


def load(folder: str | Path, overrides: Sequence[str] = ()) -> Model:
    """The newest weights of a run folder, on the mesh of its config or of the overrides, e.g. ["mesh.tensor=1"].

    A Hugging Face checkpoint folder (config.json with a model_type, safetensors) is read straight onto the mesh.  A
    pipeline is for training: here all layers come onto the devices of one stage.  Of more devices than the mesh has,
    the first are used.

    Raises ConfigError: no run folder, no checkpoint, or overrides that do not fit.
    """
    folder = Path(folder)
    path = folder / "config.json"
    require({f"a run folder holds a config.json; {folder} has none; train it first": path.is_file()})
    if "model_type" in convert.read_json(path):
        return read_published(folder, folder, overrides)[0]
    there = configs.from_json(path.read_text())
    there = replace(there, train=replace(there.train, freeze=()))  # nothing is trained here
    sharded = unstaged(configs.checked(there, overrides))
    same = sharded.config.model == there.model
    weights = restore_weights(folder, sharded) if same else adopt(folder, there, sharded)
    if missing := [name for name in sharded.shapes if name not in weights]:
        raise ConfigError([f"a run is loaded as a model whose weights it has; {folder} lacks {len(missing)}, "
                           f"first {missing[0]}; undo an override, or train with train.init={folder}"])
    return Model(sharded, weights, folder)


def unstaged(config: Config) -> Sharded:
    """The model on the first devices there are, all layers on those of one stage."""
    mesh = config.mesh
    if mesh.pipeline > 1:
        mesh = replace(mesh, pipeline=1, chunks=1, stage_layers=())
        mesh = replace(mesh, fake_devices=mesh.devices() if mesh.fake_devices else 0)
    meshes.start(mesh)
    return Sharded(replace(config, mesh=mesh), meshes.make_mesh(mesh, jax.devices()[: mesh.devices()]))


def read_published(folder: Path, run_dir: Path, overrides: Sequence[str]) -> tuple[Model, Config, convert.Checkpoint]:
    """A Hugging Face checkpoint: the model, and the config of a run that begins with it, which may have a pipeline."""
    checkpoint, own = convert.Checkpoint(folder), folder / TOKENIZER_FILE
    config = Config(name=run_dir.name, run_dir=str(run_dir), model=checkpoint.model, data=Data(
        sequence=min(checkpoint.config.get("max_position_embeddings") or 2048, 2048),
        tokenizer=str(own) if own.is_file() else ""))
    batch = configs.override(config, overrides)[0].mesh.batch_shards()
    config = configs.checked(replace(config, data=replace(config.data, batch=batch)), overrides)
    sharded = unstaged(config)
    weights, left = checkpoint.weights(sharded)
    if left:
        tell(f"{len(left)} tensors of {folder} are no part of the model and were left out, first {left[0]}")
    return Model(sharded, weights, folder), config, checkpoint


def import_folder(folder: str | Path, run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Make a run folder of a Hugging Face checkpoint, with its tokenizer: to generate, to go on training, to export.

    Returns: {"run_dir", "family", "parameters": those that are trained}.
    Raises ConfigError: all that is wrong with the checkpoint, or a run folder that is not empty.
    """
    folder, run_dir = Path(folder), Path(run_dir)
    must_be_empty(run_dir, IMPORT)
    require({f"a Hugging Face checkpoint is a folder; {folder} is none": folder.is_dir()})
    model, config, checkpoint = read_published(folder, run_dir, overrides)
    kept = folder_of(config.checkpoint, run_dir)
    require({
        f"the run folder of an import is named once; got {run_dir} and run_dir={config.run_dir}; leave run_dir out":
            config.run_dir == str(run_dir),
        f"an import writes the first checkpoint of a run; {kept} holds some already; set checkpoint.folder to another":
            not kept.exists() or not any(kept.iterdir())})
    with written(run_dir, IMPORT, folder):
        write_weights(config, model.weights)
        if config.data.tokenizer == str(folder / TOKENIZER_FILE):
            config = replace(config, data=replace(config.data, tokenizer=str(run_dir / TOKENIZER_FILE)))
        (run_dir / convert.ORIGIN).write_text(json.dumps(checkpoint.origin()))
        (run_dir / "config.json").write_text(configs.to_json(config))  # last: it makes a run of the folder
    return {"run_dir": str(run_dir), "family": checkpoint.config["model_type"],
            "parameters": model.sharded.parameters()[0]}


def export_run(run_dir: str | Path, folder: str | Path, dtype: str | None = None, overrides: Sequence[str] = ()
               ) -> dict[str, Any]:
    """Write the newest weights of a run as a Hugging Face checkpoint.

    Args:
        dtype: of all tensors, float32, bfloat16 or float16; by default as they were imported, else float32.
    Returns: {"folder", "family", "tensors": number, "bytes"}.
    Raises ConfigError: no family can express the model, a folder that is not empty, or as `load`.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    kinds = {str(kind): name for name, kind in safetensors.DTYPES.items()}
    require({f"an export is {', '.join(kinds)}; got dtype {dtype!r}": dtype is None or dtype in kinds})
    must_be_empty(folder, EXPORT)
    model = load(run_dir, overrides)
    published, dtypes = origin(run_dir, model.config.model)
    if not published:
        published = convert.family_of(model.config.model, model.config.data.sequence) | {"dtype": "float32"}
    if dtype is not None:
        published = {key: value for key, value in published.items() if key != "torch_dtype"} | {"dtype": dtype}
        dtypes = dict.fromkeys(dtypes, kinds[dtype])
    with written(folder, EXPORT, run_dir):
        result = convert.export(model.sharded, model.weights, folder, published, dtypes, kinds[dtype or "float32"])
    return {"folder": str(folder), "family": published["model_type"]} | result


def origin(run_dir: Path, model: configs.Model) -> tuple[dict[str, Any], dict[str, str]]:
    """The config.json that a run came with and its tensors' types; none without one, or for another model."""
    if "model_type" in convert.read_json(run_dir / "config.json"):
        found = convert.Checkpoint(run_dir).origin()
    elif (run_dir / convert.ORIGIN).is_file():
        found = convert.read_json(run_dir / convert.ORIGIN)
    else:
        return {}, {}
    published, dtypes = found.get("config"), found.get("dtypes")
    if not (isinstance(published, dict) and isinstance(dtypes, dict) and str(published.get("model_type")) in FAMILIES):
        raise ConfigError([f"{run_dir / convert.ORIGIN} holds the config and dtypes of a checkpoint, as an "
                           "import wrote them; it does not; import the checkpoint again"])
    return ({}, {}) if convert.lacks(published, model) else (published, dtypes)


@contextmanager
def written(folder: Path, rule: str, source: Path) -> Iterator[None]:
    """A new folder while it is written, with what stands beside the weights in `source`; where that fails it is gone.

    Raises ConfigError: it is not empty, or cannot be written.
    """
    must_be_empty(folder, rule)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in convert.BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ConfigError([f"{rule}; {folder} cannot be written ({error}); make room, or name another"]) from None


def must_be_empty(folder: Path, rule: str) -> None:
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([f"{rule}; {folder} is there already; name another, or remove it"])


def generate(model: Model, prompts: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, chat: bool = False, images: Sequence[Sequence[Any]] = ()) -> list[str]:
    """The continuation of every prompt, without the prompt; greedy at temperature 0.

    Args:
        chat: prompts are what a user says, answered in the form of the tokenizer's chat template.
        images: of every prompt, in the order of its <image>s: files of pictures or videos, or uint8 "S S 3".
    Raises ConfigError: no tokenizer or chat template, an empty prompt, wrong sampling values, or as `Model.pictures`.
    """
    tokens = [model.prompt(prompt, chat) for prompt in prompts]
    new = generate_tokens(model.sharded, model.weights, tokens, max_new_tokens, model.tokenizer.ends, temperature,
                          top_p, seed, model.pictures(tokens, images))
    return [model.tokenizer.decode(row) for row in new]



"""What `import moejax` offers: load a run and use it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jaxtyping import Integer

from moejax import config as configs
from moejax.data.tokenizer import TOKENIZERS
from moejax.model.sharded import Sharded, on_mesh
from moejax.model.transformer import Output
from moejax.parallel import mesh as meshes
from moejax.serve.generate import generate_tokens
from moejax.train.checkpoint import restore_weights


class Model:
    """A trained model on a mesh: `model(tokens)` gives its Output."""

    def __init__(self, sharded: Sharded, weights: dict[str, Array]):
        self.sharded, self.weights, self.config = sharded, weights, sharded.config
        self.tokenizer = TOKENIZERS[self.config.data.tokenizer]()

    def __call__(self, tokens: Integer[np.ndarray | Array, "B T"]) -> Output:
        """Output(logits "B T V", hidden "B T D", routing "L B T A", losses) as in evaluation.

        Raises:
            ConfigError: B is not a multiple of the mesh's batch shards, or T none of the routing group.
        """
        shards, group, problems = self.config.mesh.batch_shards(), self.config.model.moe.group, []
        if len(tokens) % shards:
            problems.append(f"the number of sequences must be a multiple of the mesh's batch shards; got "
                            f"{len(tokens)} and {shards}; pad the batch, or load with mesh.data=1")
        if group is not None and tokens.shape[1] > group and tokens.shape[1] % group:
            problems.append(f"the number of tokens must be a multiple of model.moe.group, or below it; got "
                            f"{tokens.shape[1]} and {group}; pad the sequences")
        if problems:
            raise configs.ConfigError(problems)
        return self.sharded.forward(self.weights, on_mesh(self.sharded.mesh, np.asarray(tokens, np.int32)))


def load(folder: str | Path, overrides: Sequence[str] = ()) -> Model:
    """The newest weights of a run folder, on the mesh of its config or of the overrides, e.g. ["mesh.tensor=1"].

    A pipeline is for training: here all layers come onto the devices of one stage.

    Raises:
        ConfigError: no run folder, no checkpoint, or overrides that do not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise configs.ConfigError([f"a run folder holds a config.json; {folder} has none; train it first"])
    config, problems = configs.override(configs.from_json(path.read_text()), overrides)
    problems += configs.check(config)
    if problems:
        raise configs.ConfigError(problems)
    mesh, staged = config.mesh, config.mesh.pipeline > 1
    if staged:
        mesh = dataclasses.replace(mesh, pipeline=1, chunks=1, stage_layers=())
        mesh = dataclasses.replace(mesh, fake_devices=mesh.devices() if mesh.fake_devices else 0)
        config = dataclasses.replace(config, mesh=mesh)
    meshes.start(mesh)
    sharded = Sharded(config, meshes.make_mesh(mesh, jax.devices()[: mesh.devices()] if staged else None))
    return Model(sharded, restore_weights(Path(folder), sharded))


def generate(
    model: Model, prompts: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The continuation of every prompt, without the prompt; greedy at temperature 0."""
    tokens = [model.tokenizer.encode(prompt).tolist() for prompt in prompts]
    new = generate_tokens(model.sharded, model.weights, tokens, max_new_tokens, model.tokenizer.eot, temperature, top_p,
                          seed)
    return [model.tokenizer.decode(row) for row in new]



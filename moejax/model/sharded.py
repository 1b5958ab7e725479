"""A model on a mesh: where its weights lie, how they start, and how a function of one device becomes a program."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, NamedSharding, P

from moejax import config as configs
from moejax.model import transformer, weights
from moejax.model.layers import Pass
from moejax.model.router import Losses, Routing
from moejax.model.stages import Stages
from moejax.model.transformer import Output, Transformer
from moejax.parallel import axes, collectives


class Sharded:
    """One config's model on one mesh.  Weights are a flat dict, name -> array, placed by `shardings`."""

    def __init__(self, config: configs.Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
        self.config, self.mesh = config, mesh
        self.module = transformer.abstract(config.model)
        variables = weights.flatten(self.module)
        self.axes = {name: variable.axes for name, variable in variables.items()}
        self.shapes = {name: variable.shape for name, variable in variables.items()}
        self.learned = {name: not isinstance(variable, weights.Bias) for name, variable in variables.items()}
        # Nothing is learned of images where there are none.
        frozen = {*config.train.freeze, *(() if config.data.images else ("cross", "encoder", "resampler"))}
        self.trainable = {name: learned and weights.group(name) not in frozen for name, learned in self.learned.items()}
        self.stages = Stages(config) if mesh.shape["pipeline"] > 1 and config.model.layers else None
        place = self.stages.spec if self.stages else lambda name, *args: axes.spec(*args)
        sizes = dict(mesh.shape) if self.stages else dict(mesh.shape) | {"pipeline": 1}
        self.specs = {name: place(name, self.axes[name], self.shapes[name], sizes) for name in self.axes}

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return {name: NamedSharding(self.mesh, spec) for name, spec in self.specs.items()}

    def init(self, seed: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Fresh weights, the same on every mesh: all, or those of these names."""
        places = {name: place for name, place in self.shardings.items() if names is None or name in names}

        def make() -> dict[str, Array]:
            made = weights.flatten(Transformer(self.config.model, jax.random.key(seed)))
            return {name: made[name][...] for name in places}

        return jax.jit(make, out_shardings=places)()

    def parameters(self) -> tuple[int, int]:
        """How many there are: all, and those that work on a token."""
        moe, count, active = self.config.model.moe, 0, 0
        for name in filter(self.learned.get, self.shapes):
            size = math.prod(self.shapes[name])
            count += size
            active += size * moe.active // moe.experts if "expert" in axes.names(self.axes[name]) else size
        return count, active

    def program(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function(weights on this device, *inputs)` as a function of global arrays."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=(self.specs, *in_specs), out_specs=out_specs)

    def build(self, values: dict[str, Array]) -> Transformer:
        return weights.assemble(self.module, values)

    def run(self, **changes: Any) -> Pass:
        """What a pass through the model is told by the config."""
        return Pass(**{"dtype": jnp.dtype(self.config.train.compute), "sequence": self.config.mesh.sequence,
                       "remat": self.config.train.remat} | changes)

    @cached_property
    def forward(self) -> Callable[..., Output]:
        """(weights, tokens "B T", images or None) -> all of an Output as in evaluation; the batch shards divide B."""
        rows = axes.rows(self.mesh.shape)

        def device(values: dict[str, Array], tokens: Array, images: Any) -> Output:
            model, run = self.build(values), self.run(sequence=False, remat="none")
            output, _ = model(tokens, run, sight=model.see(images, run))
            losses = output.losses and Losses(*collectives.mean(output.losses[:3]),
                                              *collectives.total(output.losses[3:], axes.BATCH))
            return output._replace(logits=model.logits(output.hidden, run), losses=losses)

        experts = "M" in self.config.model.layer_kinds()
        out = Output(P(*rows, None, "tensor"), rows, Routing(*[P(None, *rows)] * 4) if experts else None,
                     Losses(*[P()] * 5) if experts else None)
        program = jax.jit(self.program(device, (rows, rows), out))
        return lambda values, tokens, images=None: program(values, tokens, images)

    def flops_per_token(self) -> float:
        """Matmul FLOPs of one token's forward pass: counted from the weights, and from the causal half of attention."""
        model, moe = self.config.model, self.config.model.moe
        count = 0.0
        for name, text in self.axes.items():
            if "->" in text and not text.startswith("vocab") and self.rows_per_token(name):
                share = moe.active / moe.experts if "expert" in axes.names(text) else 1
                count += 2 * share * math.prod(self.shapes[name]) * self.rows_per_token(name)
        if model.tied:
            count += 2 * model.vocab * model.d_model
        sizes = model.head_dim + (model.latent[3] if model.latent else model.head_dim)
        return count + sum(2 * model.heads * sizes * keys(self.config.data.sequence, letter.islower() and model.window)
                           for letter in model.layer_letters())

    def rows_per_token(self, name: str) -> float:
        """How many rows a matrix multiplies for a token of text: of images as many as a sequence can have."""
        group, images, told = weights.group(name), self.config.data.images, self.config.model.encoder()
        if group == "text" or not images:
            return float(group == "text")
        rules, tokens = self.config.model.looks(), self.config.data.sequence
        patches = images * rules.frames * ((told.size // told.patch) ** 2 + (told.kind == "clip"))
        latents, source = images * rules.latents, name.endswith((".attention.k", ".attention.v"))
        rows = {"cross": (latents or patches) if source else tokens, "encoder": patches,
                "resampler": latents + patches * source}
        return rows[group] / tokens


def keys(tokens: int, window: int | bool | None) -> float:
    """How many a token sees, in the mean over a sequence."""
    most = min(window or tokens, tokens)
    return most - most * (most - 1) / 2 / tokens


def on_mesh(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Arrays whose first dimension is the batch, of which every process has the whole, placed on the mesh."""
    place = NamedSharding(mesh, axes.rows(mesh.shape))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), tree)

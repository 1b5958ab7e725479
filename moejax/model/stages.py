"""Which layers lie where in a pipeline, and the way of their weights there and back.

A part of the model (a chunk of a stage) is a line of slots that all parts share, as all devices run one program: a
short line of layer kinds in which the layers of every part are found in order.  A slot for which a part has no layer is
left out, its weights zeros.  Training state keeps the order of the model on every mesh.
"""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, P, lax
from jaxtyping import Float

from moejax.config import Config, Mesh
from moejax.model import transformer, weights
from moejax.model.cross import Sight
from moejax.model.layers import Pass, Stream
from moejax.model.router import Losses, Routing
from moejax.model.transformer import Transformer
from moejax.parallel import axes, collectives


class Home(NamedTuple):
    """Where the stacked weights of one slot, or of equal slots in a run, come from."""

    sources: list[str]  # the model's stacks, laid end to end
    rows: np.ndarray  # [stages, chunks × repeats] of them, -1 for none
    in_place: bool  # the shards of the one source are what the stages need


class Stages:
    """`numbers` [stages, chunks, slots] is the layer of the model in every slot (-1: none), `model` a part as a model
    of its own, `splits` the dimension in which a weight is split over the stages other than by layers (None: none is).
    """

    def __init__(self, config: Config):
        mesh, model = config.mesh, config.model
        self.stages, self.chunks = mesh.pipeline, mesh.chunks
        kinds, ends = model.layer_letters(), np.cumsum([0, *layer_counts(model.layers, mesh)])
        parts = [kinds[begin:end] for begin, end in itertools.pairwise(ends)]
        line = shortest_line(parts)
        numbers = np.full((len(parts), len(line)), -1)
        for part, layers in enumerate(parts):
            numbers[part, places(layers, line)] = np.arange(ends[part], ends[part + 1])
        self.numbers = numbers.reshape(self.chunks, self.stages, -1).swapaxes(0, 1)
        self.model = replace(model, layers=len(line), pattern=line)
        self.module = transformer.abstract(self.model, tower=False)
        self.tower = transformer.abstract(model).vision
        self.complete = bool(np.all(numbers >= 0))
        self.moe_slots = [slot for slot in range(len(line)) if self.model.layer_kinds()[slot] == "M"]
        self.splits: dict[str, int | None] = {}
        self.homes = self.find_homes(transformer.stacks(model))

    def find_homes(self, stacks: dict[str, list[int]]) -> dict[str, Home]:
        at = {layer: (prefix, row) for prefix, layers in stacks.items() for row, layer in enumerate(layers)}
        homes = {}
        for prefix, slots in transformer.stacks(self.model).items():
            needed = self.numbers[:, :, slots].reshape(self.stages, -1)
            sources = [source for source in stacks if any(at[n][0] == source for n in needed[needed >= 0])]
            begin = dict(zip(sources, np.cumsum([0, *(len(stacks[source]) for source in sources)])[:-1], strict=True))
            rows = np.array([[begin[at[n][0]] + at[n][1] if n >= 0 else -1 for n in row] for row in needed])
            whole = len(sources) == 1 and rows.size == len(stacks[sources[0]])
            homes[prefix] = Home(sources, rows, whole and bool(np.all(rows.ravel() == np.arange(rows.size))))
        return homes

    def spec(self, name: str, text: str, shape: tuple[int, ...], mesh: dict[str, int]) -> P:
        """How a weight lies: split along its layers, or, where stages need others or all of it, along what divides."""
        if any(home.in_place and prefix_of(name) == home.sources[0] for home in self.homes.values()):
            return axes.spec(text, shape, mesh)
        place = axes.spec(text, shape, mesh | {"pipeline": 1})
        place = axes.further(place, shape, "pipeline", self.stages, first=name.startswith("runs."))
        self.splits[name] = place.index("pipeline") if "pipeline" in place else None
        return place

    def spread(self, values: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """This device's shards of the weights -> (of its parts, [chunks, repeats, …]; of no layer); linear."""
        local = {}
        for prefix, home in self.homes.items():
            for name in [name for name in values if prefix_of(name) == home.sources[0]]:
                suffix = name.removeprefix(home.sources[0])
                rows = self.fetch([values[source + suffix] for source in home.sources], home, self.splits.get(name))
                local[prefix + suffix] = rows.reshape(self.chunks, -1, *rows.shape[1:])
        return local, {name: self.whole(name, value) for name, value in values.items()
                       if not name.startswith(("runs.", "vision."))}

    def whole(self, name: str, value: Array) -> Array:
        dim = self.splits[name]
        return value if dim is None else collectives.from_stages(value, dim)

    def see(self, values: dict[str, Array], images: Any, run: Pass) -> Float[Array, "B I O W"]:
        """What the images of this device's sequences give to look at: every stage does its share of them."""
        tower = weights.assemble(self.tower, {name.removeprefix("vision."): self.whole(name, value)
                                              for name, value in values.items() if name.startswith("vision.")})
        batch, count = images.frames.shape
        share = -(-batch * count // self.stages)

        def mine(x: Array) -> Array:
            x = x.reshape(-1, 1, *x.shape[2:])
            x = jnp.pad(x, [(0, share * self.stages - len(x)), *[(0, 0)] * (x.ndim - 1)])
            return lax.dynamic_slice_in_dim(x, collectives.index("pipeline") * share, share)

        found, _ = tower(mine(images.pixels), mine(images.frames), run)
        found = collectives.from_stages(found.astype(jnp.float32), 0)[:batch * count]
        return found.reshape(batch, count, *found.shape[2:])

    def fetch(self, stack: list[Array], home: Home, dim: int | None) -> Array:
        if home.in_place:
            return stack[0]
        rows, index = jnp.concatenate(stack), jnp.asarray(home.rows)
        index = index[collectives.index("pipeline")] if dim is None else index.ravel()
        some = (index >= 0).reshape(-1, *[1] * (rows.ndim - 1))
        rows = jnp.where(some, rows[jnp.maximum(index, 0)], 0)
        return rows if dim is None else collectives.to_stages(rows, dim)

    def build(self, part: dict[str, Array], shared: dict[str, Array]) -> Transformer:
        """The model whose layers are those of one part; as `spread` gives them, without the axis of chunks."""
        return weights.assemble(self.module, part | shared)

    def run(self, part: dict[str, Array], shared: dict[str, Array], x: Stream, run: Pass, c: Array,
            images: Any) -> tuple[Stream, tuple[Routing, Losses] | None]:
        """x through the layers of chunk c of this stage; the decisions per MoE slot.  `part` has what is to be seen."""
        numbers = jnp.asarray(self.numbers, jnp.int32)[collectives.index("pipeline"), c]
        tokens = x.shape[1] * (lax.axis_size("tensor") if run.sequence else 1)
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (x.shape[0], tokens))
        present = None if self.complete else numbers >= 0
        sight = None
        if images is not None:
            there = self.tower.there(images.frames, part["sight"].shape[2], images.pixels.shape[2])
            sight = Sight(part["sight"], there, images.looks)
        x, found, _ = self.build(part, shared).layers(x, positions, run, None, numbers, present, sight)
        return x, found

    def of_layers(self, figures: Array) -> Array:
        """Figures per MoE slot of this stage, [chunks, slots, …] -> per MoE layer of the model, zeros if not here."""
        numbers = self.numbers[:, :, self.moe_slots]
        layers = np.sort(numbers[numbers >= 0])
        index = np.where(numbers < 0, len(layers), np.searchsorted(layers, numbers)).astype(np.int32)
        index = jnp.asarray(index)[collectives.index("pipeline")].ravel()
        flat = figures.reshape(-1, *figures.shape[2:])
        zeros = collectives.match(jnp.zeros((len(layers), *flat.shape[1:]), flat.dtype), flat, index)
        return zeros.at[index].add(flat, mode="drop")


def prefix_of(name: str) -> str:
    """The stack of a stacked weight: "runs.0.1" of "runs.0.1.feed.up"."""
    return ".".join(name.split(".")[:3])


def layer_counts(layers: int, mesh: Mesh) -> tuple[int, ...]:
    """Layers of every part: as configured, or even, with one less in the first parts where it does not divide."""
    small, more = divmod(layers, mesh.parts())
    return mesh.stage_layers or tuple(small + (part >= mesh.parts() - more) for part in range(mesh.parts()))


def shortest_line(parts: list[str]) -> str:
    """A short string that holds every part as a subsequence: the shortest for each two in turn."""
    line = ""
    for part in parts:
        best = [[part[:j] for j in range(len(part) + 1)]]
        for i, a in enumerate(line):
            row = [line[: i + 1]]
            for j, b in enumerate(part):
                row.append(best[i][j] + a if a == b else min(row[j] + b, best[i][j + 1] + a, key=len))
            best.append(row)
        line = best[-1][-1]
    return line


def places(part: str, line: str) -> list[int]:
    """Where in the line each letter of the part comes to lie, as early as it can."""
    return list(itertools.accumulate(part, lambda at, letter: line.index(letter, at + 1), initial=-1))[1:]

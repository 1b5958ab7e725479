"""The weights a run begins with: fresh ones, or those of other runs, stacked in another way, with more or less."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array, NamedSharding

from moejax.config import Config, ConfigError
from moejax.model import transformer, weights
from moejax.model.sharded import Sharded
from moejax.model.stages import prefix_of
from moejax.model.weights import group
from moejax.parallel import axes
from moejax.train.checkpoint import config_of, differences, restore_weights
from moejax.train.fault import tell


def beginning(sharded: Sharded) -> dict[str, Array]:
    """Each weight from the first run of train.init that has it, else fresh.  Raises ConfigError: no run; as `adopt`."""
    found: dict[str, Array] = {}
    folders = [Path(name.strip()) for name in sharded.config.train.init.split(",") if name.strip()]
    for folder, config in {folder: config_of(folder) for folder in folders}.items():  # all are read before any is used
        if unlike := [what for what in differences(config, sharded.config) if what.startswith("model.")]:
            tell(f"this model is not that of {folder}: {'; '.join(unlike)}")
        found = adopt(folder, config, sharded) | found
    fresh = [name for name in sharded.shapes if name not in found]
    if folders and fresh:
        tell(f"{len(fresh)} of {len(sharded.shapes)} weights are in none of {', '.join(map(str, folders))} and start "
             f"fresh ({', '.join(sorted({group(name) for name in fresh}))})")
    return found | sharded.init(sharded.config.train.seed, fresh)


def adopt(folder: Path, there: Config, sharded: Sharded) -> dict[str, Array]:
    """Those weights of this model that a run of another config has: all of text, cross, encoder or resampler, or none.
    Raises ConfigError: it has nothing, or a part of one of these, or other sizes; or as `restore_weights`.
    """
    old = weights.flatten(transformer.abstract(there.model))
    at = {layer: (prefix, row) for prefix, layers in transformer.stacks(there.model).items()
          for row, layer in enumerate(layers)}
    mine, sources = transformer.stacks(sharded.config.model), {}
    for name in sharded.shapes:
        prefix, layered = prefix_of(name), name.startswith("runs.")
        found = [at.get(layer) for layer in mine[prefix]] if layered else [(name, None)]
        found = [each and (each[0] + name.removeprefix(prefix) * layered, each[1]) for each in found]
        if all(each and each[0] in old for each in found):
            sources[name] = found
    if not sources:
        raise ConfigError([f"a run begins with weights of another that has some of its own; {folder} has none; take it "
                           "out of train.init"])
    lacks = [name for name in sharded.shapes if name not in sources]
    wrong = [f"of {part} it has some weights and lacks {next(name for name in lacks if group(name) == part)}"
             for part in sorted({group(name) for name in sources} & {group(name) for name in lacks})]
    targets = {}
    for name, rows in sources.items():
        for source in dict.fromkeys(source for source, _ in rows):
            shape, cut = old[source].shape, name.startswith("runs.")
            if shape[cut:] != sharded.shapes[name][cut:]:
                wrong.append(f"{name} has {shape}, and {sharded.shapes[name]} here")
                continue
            place = sharded.specs[name] if shape == sharded.shapes[name] else axes.spec(
                old[source].axes, shape, dict(sharded.mesh.shape) | {"pipeline": 1})
            targets[source] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(sharded.mesh, place))
    if wrong:
        raise ConfigError([f"a run begins with weights of a model like its own; in {folder} {'; '.join(wrong[:3])}"
                           f"{' …' * (len(wrong) > 3)}; set the model's fields to those of {folder}/config.json"])
    values = restore_weights(folder, sharded, rules=there.checkpoint, targets=targets)
    return {name: restack(name, rows, values, sharded) for name, rows in sources.items()}


def restack(name: str, rows: list[tuple[str, int | None]], values: dict[str, Array], sharded: Sharded) -> Array:
    """A weight of this model out of rows of others."""
    stacks = {source: values[source] for source, _ in rows}
    (first, *others), place = stacks.values(), sharded.shardings[name]
    if not others and [row for _, row in rows] in ([None], list(range(len(first)))):
        return jax.device_put(first, place)
    return jax.jit(lambda stacks: jnp.stack([stacks[source][row] for source, row in rows]), out_shardings=place)(stacks)

"""Running what one device does, on meshes of some of the eight fake devices."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import weights
from moejax.parallel.mesh import make_mesh

ONE, EVERYWHERE = configs.Mesh(), P()


@pytest.fixture(scope="session")
def inside():
    """inside(function, *global inputs): `function` on every device of a mesh, by default of one; jitted, to numpy."""

    def run(function, *inputs, mesh=ONE, before=EVERYWHERE, after=EVERYWHERE):
        devices = make_mesh(mesh, jax.devices()[: mesh.devices()])
        out = jax.jit(jax.shard_map(function, mesh=devices, in_specs=before, out_specs=after))(*inputs)
        return jax.device_get(out)

    return run


@pytest.fixture(scope="session")
def made():
    """made(layer class, model, …): the layer without numbers, and normal random weights drawn by numpy.

    (Drawing them as the model does costs more to compile than most of what is tested.)
    """

    def make(layer: type[nnx.Module], model: configs.Model, *args):
        def build():
            return layer(weights.Weights(model, jax.random.key(0)), model, *args)

        empty, random = nnx.eval_shape(build), np.random.default_rng(7)
        return empty, {name: random.normal(size=variable.shape, scale=.4).astype(np.float32)
                       for name, variable in weights.flatten(empty).items()}

    return make


@pytest.fixture(scope="session")
def numbers():
    """numbers(sharded): random weights for all of a model, on its mesh; the same ones on every mesh."""

    def draw(sharded) -> dict[str, jax.Array]:
        random, values = np.random.default_rng(7), {}
        for name, shape in sharded.shapes.items():
            start = 1 if name.endswith("scale") else 0
            values[name] = (start + random.normal(size=shape, scale=.3)).astype(np.float32)
        return jax.device_put(values, sharded.shardings)

    return draw

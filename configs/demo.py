"""The first thing to run: `make demo`."""

from moejax.config import Config, Mesh, Model


def config() -> Config:
    return Config(model=Model(), mesh=Mesh(data=2, expert=2, tensor=2, fake_devices=8))

"""A model for quick checks: `moejax train configs/tiny.py`, 20 steps on one CPU."""

from moejax.config import Checkpoint, Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=2, d_model=64, heads=4, head_dim=16, hidden=128, moe=MoE(experts=4, hidden=64)),
        mesh=Mesh(fake_devices=1),
        data=Data(sequence=64, batch=8),
        optimizer=Optimizer(lr=3e-3, warmup=5),
        train=Train(steps=20, eval_every=10, eval_batches=2),
        checkpoint=Checkpoint(every=10),
    )

"""The first thing to run: `make demo`."""

from moejax.config import Checkpoint, Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=4, d_model=256, heads=8, kv_heads=1, head_dim=32, moe=MoE(experts=8, active=2, hidden=256)),
        mesh=Mesh(data=2, expert=2, tensor=2, fake_devices=8),
        data=Data(sequence=256, batch=16),
        optimizer=Optimizer(lr=3e-3, warmup=30),
        train=Train(steps=260, eval_every=65, eval_batches=8),
        checkpoint=Checkpoint(every=130),
    )

"""A pipeline of 4 stages beside tensor parallelism, with the losses that the same run has on one device.

    moejax train configs/pipeline.py
    moejax plan configs/pipeline.py --schedule     # draws its ticks

Hardware: 8 fake devices on 2 CPU cores, 20 steps with compilation and timing of the bubble in 41 s (2026-11-21).
"""

from moejax.config import Checkpoint, Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=8, d_model=64, heads=4, head_dim=16, moe=MoE(experts=4, hidden=128)),
        mesh=Mesh(pipeline=4, tensor=2, fake_devices=8),
        data=Data(sequence=128, batch=16),
        optimizer=Optimizer(lr=3e-3, warmup=10),
        train=Train(steps=100, microbatches=8, remat="full", eval_every=50, eval_batches=4),
        checkpoint=Checkpoint(every=50),
    )

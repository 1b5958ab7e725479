"""A small model that sees, for `moejax verify configs/vision.py`: every layout gives the same numbers.

Its pictures are rendered when the config is read for the first time (launch/render.py, into runs/pictures-small).
"""

import runpy
from pathlib import Path

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    render = runpy.run_path(str(Path(__file__).parents[1] / "launch" / "render.py"))["main"]
    render(["runs/pictures-small", "--train", "200", "--test", "8", "--once"])
    return Config(
        model=Model(
            layers=4, pattern="VM", d_model=64, heads=4, kv_heads=1, head_dim=16, hidden=96,
            moe=MoE(experts=4, active=2, hidden=64),
            vision="clip size=64 patch=16 width=48 layers=2 heads=4 hidden=96",
            cross="last latents=8 depth=2 heads=4 head=12"),
        mesh=Mesh(fake_devices=1),
        data=Data(sources=("runs/pictures-small/train.tar",), sequence=64, batch=16, images=3, validation=0.1),
        optimizer=Optimizer(lr=3e-3, warmup=5),
        train=Train(steps=20, eval_every=10, eval_batches=2),
    )

"""Reading pictures: lines of Python's own source and formulas, rendered with a real font, are to be written down.

    moejax train configs/vision_demo.py   # or `make demo-vision`, which also reads test pictures, seen and blacked out

The 20,000 pictures are rendered when the config is read for the first time (launch/render.py, into runs/pictures).

Hardware: 2 fake devices on 2 CPU cores, 49 min beside other work (2026-11-22; a step took 0.42 s at best).  Result, of
200 test pictures: 99.1 % of the characters of sources are exact (1.5 % with the picture blacked out) and 95.9 % of the
sources whole; of formulas 51.5 % (0.3 %), and none whole.  Validation loss 0.19 nats per byte, a unigram model's 3.78.
"""

import runpy
from pathlib import Path

from moejax.config import Checkpoint, Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    render = runpy.run_path(str(Path(__file__).parents[1] / "launch" / "render.py"))["main"]
    render(["runs/pictures", "--once"])
    return Config(
        model=Model(
            layers=4, pattern="MV", d_model=128, heads=4, kv_heads=1, head_dim=32, hidden=256,
            moe=MoE(experts=4, active=2, hidden=128),
            vision="siglip size=64 patch=8 width=96 layers=3 heads=4 hidden=384",
            cross="last latents=0"),  # all 64 patches of the last picture
        mesh=Mesh(data=2, fake_devices=2),
        data=Data(sources=("runs/pictures/train.tar",), sequence=64, batch=24, images=3),
        optimizer=Optimizer(lr=2e-3, warmup=60),
        train=Train(steps=2000, eval_every=200, eval_batches=8, log_every=50),
        checkpoint=Checkpoint(every=500),
    )

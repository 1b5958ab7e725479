"""The sparse 1.2 T model of arXiv 2112.06905: every other layer has 64 experts, two for a token.

    moejax plan configs/moe_64e.py --on v4x1024 --tokens 600e9
"""

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=64, pattern="DM", d_model=8192, heads=128, kv_heads=128, head_dim=128, hidden=32768,
                    activation="gelu", vocab=256_000, tied=True,
                    moe=MoE(experts=64, active=2, hidden=32768, group=1024)),
        mesh=Mesh(fsdp=8, expert=64, tensor=2),
        data=Data(sequence=1024, batch=1024, tokenizer=""),
        optimizer=Optimizer(name="adafactor", lr=1e-2, schedule="rsqrt", warmup=10_000),
        train=Train(steps=600_000, microbatches=2, compute="bfloat16", remat="full"),
    )

"""Switch-Base (arXiv 2101.03961): every other layer has 128 experts, one for a token; 7.4 B parameters in all.

    moejax plan configs/switch_base.py --on v4x32 --tokens 576e9

Its 12 encoder and 12 decoder layers stand here as 24 of a decoder, so without attention from decoder to encoder.
"""

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=24, pattern="DM", d_model=768, heads=12, kv_heads=12, head_dim=64, hidden=3072,
                    activation="relu", vocab=32128, tied=True,
                    moe=MoE(experts=128, active=1, hidden=3072, renormalise=False, jitter=0.01)),
        mesh=Mesh(expert=32),
        data=Data(sequence=512, batch=2048, tokenizer=""),
        optimizer=Optimizer(name="adafactor", lr=1e-2, schedule="rsqrt", warmup=10_000),
        train=Train(steps=550_000, microbatches=4, compute="bfloat16"),
    )

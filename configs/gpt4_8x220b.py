"""The other rumour of the same model: 8 experts of 220 B parameters each, two of them for a token.

    moejax plan configs/gpt4_8x220b.py --on A100x25000 --tokens 13e12
"""

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=120, d_model=10752, heads=168, kv_heads=1, head_dim=128, activation="gelu", vocab=100352,
                    moe=MoE(experts=8, active=2, hidden=86016)),
        mesh=Mesh(tensor=8, pipeline=15, sequence=True),
        data=Data(sequence=8192, batch=35, tokenizer=""),
        optimizer=Optimizer(lr=1e-4, warmup=2000),
        train=Train(steps=217_000, microbatches=35, compute="bfloat16", remat="full"),
    )

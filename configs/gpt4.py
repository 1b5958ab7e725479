"""The full-size model of the rumours: 1.8 T parameters, 16 experts top-2, multi-query attention.

    moejax plan configs/gpt4.py --on A100x25000 --tokens 13e12
    moejax plan configs/gpt4.py --leak
    moejax compile configs/gpt4.py --devices 120

The mesh is one copy of it, tensor 8 × pipeline 15, with its share of 60 M tokens a step on 25,000 devices.
"""

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=120, d_model=10752, heads=168, kv_heads=1, head_dim=128, activation="gelu", vocab=100352,
                    moe=MoE(experts=16, active=2, hidden=43008)),
        mesh=Mesh(tensor=8, pipeline=15, sequence=True),
        data=Data(sequence=8192, batch=35, tokenizer=""),
        optimizer=Optimizer(lr=1e-4, warmup=2000),
        train=Train(steps=217_000, microbatches=35, compute="bfloat16", remat="full"),
    )

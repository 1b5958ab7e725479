"""The dense 175 B model of arXiv 2005.14165, which the price of the sparse one is compared with.

    moejax plan configs/davinci.py --on A100x1024 --tokens 300e9
"""

from moejax.config import Config, Data, Mesh, Model, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=96, pattern="D", d_model=12288, heads=96, kv_heads=96, head_dim=128, hidden=49152,
                    activation="gelu", norm="layernorm", vocab=50264, tied=True),
        mesh=Mesh(tensor=8, pipeline=8, sequence=True),
        data=Data(sequence=2048, batch=96, tokenizer=""),
        optimizer=Optimizer(lr=6e-5, warmup=250),
        train=Train(steps=95_000, microbatches=96, compute="bfloat16", remat="full"),
    )

"""Mixtral 8×7B (arXiv 2401.04088): 46.7 B parameters, 12.9 B of them for a token.

    moejax plan configs/mixtral_8x7b.py --on H100x64 --tokens 1e12
    moejax plan configs/mixtral_8x7b.py --search --on H100x64
"""

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=32, d_model=4096, heads=32, kv_heads=8, head_dim=128, norm_eps=1e-5, rope_theta=1e6,
                    vocab=32000, moe=MoE(experts=8, active=2, hidden=14336, balance_loss=0.02)),
        mesh=Mesh(fsdp=8, expert=8, zero1=True),
        data=Data(sequence=4096, batch=1024, tokenizer=""),
        optimizer=Optimizer(lr=3e-4, warmup=2000),
        train=Train(steps=240_000, microbatches=16, compute="bfloat16", remat="full"),
    )

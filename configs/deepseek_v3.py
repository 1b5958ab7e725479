"""DeepSeek-V3 (arXiv 2412.19437): 671 B parameters, 37 B for a token; latent attention, 256 routed experts, one shared.

    moejax plan configs/deepseek_v3.py --on H100x2048 --tokens 14.8e12

Without the layer that predicts a second token, and in bfloat16 in place of 8 bits.
"""

from moejax.config import Config, Data, Mesh, Model, MoE, Optimizer, Train


def config() -> Config:
    return Config(
        model=Model(layers=61, pattern="DDD" + 58 * "M", d_model=7168, heads=128, kv_heads=128, head_dim=192,
                    latent=(1536, 512, 64, 128), hidden=18432, vocab=129280,
                    moe=MoE(experts=256, active=8, hidden=2048, shared=2048, router="sigmoid", scale=2.5,
                            expert_groups=8, active_groups=4, balance_loss=0.0001, z_loss=0.0)),
        mesh=Mesh(fsdp=2, pipeline=16, expert=64, zero1=True),
        data=Data(sequence=4096, batch=15360, tokenizer=""),
        optimizer=Optimizer(lr=2.2e-4, schedule="wsd", warmup=2000),
        train=Train(steps=235_000, microbatches=60, compute="bfloat16", remat="full"),
    )

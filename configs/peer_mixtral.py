"""The small Mixtral that `make bench-peer` also trains with transformers and MaxText: 17 M parameters, dropless."""

from moejax.config import Config, Data, Model, MoE, Optimizer


def config() -> Config:
    return Config(
        model=Model(layers=4, d_model=256, heads=8, kv_heads=2, head_dim=32, vocab=8192,
                    moe=MoE(experts=8, hidden=512, capacity_factor=None, dispatcher="blocked", balance_loss=0.02)),
        data=Data(sequence=512, batch=8),
        optimizer=Optimizer(lr=1e-4, warmup=0),
    )

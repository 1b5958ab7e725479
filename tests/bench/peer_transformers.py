"""Seconds of a training step of configs/peer_mixtral.py's model in Hugging Face transformers, as one line of JSON."""

import json
import statistics
import sys
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

BATCH, SEQUENCE = 8, 512


def main(steps: int) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, num_local_experts=8, num_experts_per_tok=2, intermediate_size=512, max_position_embeddings=1024,
        output_router_logits=True, router_aux_loss_coef=0.02)
    model = MixtralForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds, cpu = [], []
    for _ in range(steps + 2):
        ids = torch.randint(0, 8192, (BATCH, SEQUENCE))
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    print(json.dumps({"step_s": statistics.median(seconds[2:]), "cpu_s": statistics.median(cpu[2:])}))


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""The published figures of configs/gpt4.py's model (a newsletter, July 2023), beside what its dimensions give."""

from typing import NamedTuple

from moejax.config import Config
from moejax.parallel.hardware import DEVICES, Device
from moejax.plan import budget, cost
from moejax.plan.count import make_program

A100, H100 = DEVICES["A100"], DEVICES["H100"]
TOKENS, BATCH = 13e12, 60e6
DEVICES_OF_ONE = 120  # tensor 8 × pipeline 15


class Figure(NamedTuple):
    name: str
    published: float | None
    ours: float
    unit: str
    note: str = ""  # where it does not hold, why

    @property
    def residual(self) -> float | None:
        return self.published and self.ours / self.published - 1


def figures(config: Config) -> list[Figure]:
    sharded, _, _ = make_program(config)
    params = budget.params(sharded)
    total, active = sharded.parameters()
    matmuls = active - params["embedding"]  # a lookup multiplies nothing
    forward, run = 2 * matmuls, 6 * matmuls * TOKENS
    a_head = cost.cache_per_token(config) / config.model.kv_heads

    def utilisation(device: Device, count: float, days: float) -> float:
        return run / (count * device.bfloat16 * days * cost.DAY)

    def served(device: Device, dollars_an_hour: float, dollars: float) -> float:
        """Utilisation at which 1,000 tokens cost so much, on any number of devices."""
        return dollars_an_hour / dollars * 1000 / 3600 * forward / device.bfloat16

    replicas, days = 25_000 // DEVICES_OF_ONE, 63e6 / (25_000 * 24)
    microbatches = round(BATCH / config.data.sequence / replicas)
    bubble = 14 / (microbatches + 14)
    return [
        Figure("parameters", 1.8e12, total, "", "the dimensions are rounded to what divides by 8 and 128"),
        Figure("parameters of an expert", 111e9, params["per_expert"], ""),
        Figure("parameters of attention", 55e9, params["attention"], ""),
        Figure("active parameters", 280e9, active, ""),
        Figure("FLOP forward per token", 560e9, forward, "FLOP", "published as TFLOP, a thousand times as much: 2 FLOP "
               "a parameter and token is GFLOP; without attention scores, which at 8k are "
               f"{budget.si(sharded.flops_per_token() - forward)}FLOP more"),
        Figure("FLOP forward if dense", 3700e9, 2 * (total - params["embedding"]), "FLOP", "GFLOP here too"),
        Figure("training FLOP", 2.15e25, run, "FLOP", "13 T tokens × 6 × active"),
        Figure("utilisation, 25,000 A100 for 90 days", 0.36, utilisation(A100, 25_000, 90), "share"),
        Figure("utilisation, 25,000 A100 for 100 days", 0.32, utilisation(A100, 25_000, 100), "share"),
        Figure("dollars, 25,000 A100 at $1 an hour", 63e6, 25_000 * 24 * 100.0, "$",
               f"100 days are shown; 90 to 100 days cost $54 M to $60 M, so $63 M is {days:.0f} days, at "
               f"{utilisation(A100, 25_000, days):.1%} utilisation"),
        Figure("dollars, 8,192 H100 for 55 days at $2", 21.5e6, 8192 * 55 * 24 * 2.0, "$",
               f"needs {utilisation(H100, 8192, 55):.1%} utilisation, far above the 32 % to 36 % of the other run"),
        Figure("FP16 weights on a GPU, tensor 8 × pipeline 15", 30e9, 2 * total / DEVICES_OF_ONE, "B"),
        Figure("8-bit weights on a GPU", 15e9, total / DEVICES_OF_ONE, "B"),
        Figure("tokens of a batch for an expert", 7.5e6, BATCH * config.model.moe.active / config.model.moe.experts, "",
               f"of 60 M; {replicas} pipelines have {microbatches} sequences of 8,192 each: a bubble of {bubble:.1%} "
               "with 1f1b"),
        Figure("utilisation, 128 A100 at $0.0049 for 1,000", None, served(A100, 1, 0.0049), "share",
               f"at $1 an hour; read as 0.0049 cents it would be {served(A100, 1, 0.000049):.0%}, more than they have"),
        Figure("utilisation, 128 H100 at $0.0021 for 1,000", None, served(H100, 2, 0.0021), "share",
               f"at $2 an hour; read as 0.0021 cents it would be {served(H100, 2, 0.000021):.0%}"),
        Figure("price in davincis (175 B dense)", 3.0, matmuls / 174.6e9, "×",
               "by FLOPs alone; the rest would be lower utilisation, so it cannot be computed from dimensions"),
        *(Figure(f"KV cache of a sequence, {length // 1024}k, {heads} KV head{'s'[heads == 1:]}", None,
                 length * a_head * heads, "B") for length in (8192, 32768) for heads in (1, config.model.heads))]


def text(found: list[Figure]) -> str:
    lines = [f"{'figure':<46} {'published':>11} {'here':>11} {'off by':>7}"]
    for each in found:
        given, off = ("-", "-") if each.published is None else (f"{each.published:.4g}", f"{each.residual:+.1%}")
        lines.append(f"{each.name:<46} {given:>11} {each.ours:11.4g} {off:>7}  {each.unit}".rstrip())
        lines += [f"    {each.note}"] if each.note else []
    return "\n".join(lines)

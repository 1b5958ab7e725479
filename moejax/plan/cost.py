"""What counted work costs on given devices: seconds of a step, days, dollars; and a model in use.  Imports no jax.

Time is a roofline: a matmul takes as long as its FLOPs or its bytes need, whichever is more; what devices send comes on
top, as if nothing overlapped.  It is a bound from data sheets: real machines reach less of their peak.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping

from moejax.config import Config
from moejax.parallel.hardware import Device

DAY = 86400


def speed(axes: str, lengths: dict[str, int], device: Device) -> float:
    """Bytes a second along axes as in "data+fsdp": by links where all partners lie in one domain, else by network."""
    order = list(lengths)
    inner = math.prod(lengths[axis] for axis in order[order.index(axes.split("+")[0]):])
    return device.link if inner <= device.domain else device.network


def step_seconds(dots: Mapping[tuple[float, float], float], sent: Mapping[str, float], lengths: dict[str, int],
                 compute: str, device: Device) -> tuple[float, float]:
    """(seconds in matmuls, seconds in communication) of one step."""
    peak = device.flops(compute)
    return (sum(max(flops / peak, size / device.bandwidth) * times for (flops, size), times in dots.items()),
            sum(size / speed(axes, lengths, device) for axes, size in sent.items()))


def training(flops_per_token: float, tokens: float, devices: int, device: Device,
             utilisation: float) -> dict[str, float | None]:
    """Days, device hours and dollars (None without a price) of a run.  `flops_per_token` is of training."""
    seconds = flops_per_token * tokens / (devices * device.bfloat16 * utilisation)
    hours = devices * seconds / 3600
    return {"days": seconds / DAY, "device_hours": hours,
            "dollars": None if device.price is None else hours * device.price}


def chinchilla(active: float, tokens: float) -> dict[str, float]:
    """The same training FLOPs where loss would be least for a dense model: 20 tokens a parameter (arXiv 2203.15556)."""
    flops = 6 * active * tokens
    return {"parameters": math.sqrt(flops / 120), "tokens": 20 * math.sqrt(flops / 120),
            "tokens_per_active": tokens / active}


def cache_per_token(config: Config, tensor: int = 1) -> float:
    """Bytes of bfloat16 keys and values that a token leaves on a device, which holds every KV head it needs."""
    model = config.model
    sizes = model.head_dim + (model.latent[3] if model.latent else model.head_dim)
    return model.layers * max(model.kv_heads / tensor, 1) * sizes * 2


def touched(experts: int, active: int, tokens: float) -> float:
    """How many experts of a layer so many tokens choose together, if each chooses `active` at random."""
    return experts * (1 - (1 - active / experts) ** tokens)


def decoding(weights: Mapping[str, float], config: Config, batch: int, context: int, devices: int, device: Device,
             worst: bool = False) -> dict[str, float]:
    """One token for each of `batch` sequences in bfloat16, on a model spread over all devices.

    Args:
        weights: parameters that every token uses ("shared"), and of all experts ("experts").
        worst: every choice goes to another expert, while there are any; else at random.
    Returns: seconds a step, tokens a second, utilisation, experts touched, and 1 if FLOPs and not bytes are the limit.
    """
    model, moe = config.model, config.model.moe
    some = min(moe.experts, moe.active * batch) if worst else touched(moe.experts, moe.active, batch)
    some = some if weights["experts"] else 0.0
    read = 2 * (weights["shared"] + weights["experts"] * some / moe.experts)
    read += batch * context * cache_per_token(config)
    flops = 2 * batch * (weights["shared"] + weights["experts"] * moe.active / moe.experts)
    flops += 4 * batch * context * model.layers * model.heads * model.head_dim
    # Every layer sums twice over the devices that share its matmuls: at least a microsecond and a half on a fast link.
    waiting = 2 * model.layers * 1.5e-6 * (devices > 1)
    by_bytes, by_flops = read / (devices * device.bandwidth), flops / (devices * device.bfloat16)
    seconds = max(by_bytes, by_flops) + waiting
    return {"batch": batch, "seconds": seconds, "tokens_per_s": batch / seconds, "experts": some,
            "utilisation": flops / (devices * device.bfloat16 * seconds), "compute_bound": float(by_flops >= by_bytes)}


def turning(weights: Mapping[str, float], config: Config, context: int, devices: int, device: Device) -> int | None:
    """The smallest batch at which FLOPs and not bytes are the limit; None where caches alone keep it from that."""
    batches = range(1, 2**20 + 1)
    at = bisect_left(batches, True, key=lambda batch: decoding(
        weights, config, batch, context, devices, device)["compute_bound"])
    return batches[at] if at < len(batches) else None


def speculation(acceptance: float, draft: int, cost: float) -> float:
    """The gain of `draft` guessed tokens, each of cost `cost` and accepted so likely (arXiv 2211.17192 theorem 3.8)."""
    return sum(acceptance**guess for guess in range(draft + 1)) / (draft * cost + 1)

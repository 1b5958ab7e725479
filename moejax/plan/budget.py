"""One config's parameters, FLOPs, memory, traffic, time and price on given devices."""

import math
from dataclasses import replace
from typing import Any

import jax

from moejax.config import Config, ConfigError, Mesh, check, refuse
from moejax.model import weights
from moejax.model.sharded import Sharded
from moejax.parallel import axes, hardware, schedules
from moejax.plan import cost
from moejax.plan.count import flops_of, make_program, shard_bytes, trace
from moejax.train import state as states

REMATS = ("none", "weights", "dots", "full")


def plan(config: Config, on: str = "", tokens: float | None = None, mfu: float | None = None) -> dict[str, Any]:
    """All of it; bytes and FLOPs are of one device and one step where nothing else is said.

    Args:
        on: "H100x1024"; the config's mesh is repeated along `data`, with its batch, as often as it fits.
        tokens: of the whole training; by default those of train.steps.
        mfu: a model FLOP/s utilisation to reckon days with, instead of the roofline's.
    Raises ConfigError: no such device, fewer than the mesh needs, or a mesh that does not divide the model.
    """
    device, count = hardware.named(on or "H100", config.hardware, config.mesh.devices())
    config = spread(config, count)
    sharded, _, (state, _) = make_program(config)
    counted = {remat: trace(replace(config, train=replace(config.train, remat=remat))) for remat in REMATS}
    mine, mesh = counted[config.train.remat], config.mesh
    step_tokens = config.data.batch * config.data.sequence
    tokens = tokens or step_tokens * config.train.steps
    total, active = sharded.parameters()
    forward = sharded.flops_per_token()
    work, talk = cost.step_seconds(mine.dots, mine.sent, mesh.lengths(), config.train.compute, device)
    reached = 3 * forward * step_tokens / (mesh.devices() * device.flops(config.train.compute) * (work + talk))
    memory = memory_of(sharded, state) | {
        "cache_bytes_per_device": config.data.batch / mesh.batch_shards() * config.data.sequence
        * cost.cache_per_token(config, mesh.tensor) / mesh.pipeline}
    held = {remat: max(each.peak - memory["gradients_bytes_per_device"], 0.0) for remat, each in counted.items()}
    memory["activations_bytes_per_device"] = held[config.train.remat]
    result = {
        "config": config.name, "device": device.name, "price": device.price, "dated": device.dated,
        "devices": mesh.devices(), "asked": count,
        "params": params(sharded) | {"total": total, "active": active},
        "flops": {"forward_per_token": forward, "train_per_token": 3 * forward, "train_total": 3 * forward * tokens,
                  "executed_per_device": flops_of(mine.dots)},
        "memory": memory | {"activations_by_remat": held, "device_bytes": device.memory},
        "comm": {"bytes_per_step": {name: round(size) for name, size in mine.sent.items()}, "seconds": talk},
        "bubble": schedules.make(config).bubble() if mesh.pipeline > 1 else 0.0, "mfu": mfu or reached,
        "roofline_mfu": reached, "step_seconds": work + talk if mfu is None else (work + talk) * reached / mfu,
        "tokens": tokens, "step_tokens": step_tokens, "chinchilla": cost.chinchilla(active, tokens)}
    result["fits"] = sum(memory[f"{part}_bytes_per_device"] for part in (
        "weights", "gradients", "optimizer", "activations")) <= device.memory
    return result | cost.training(3 * forward, tokens, mesh.devices(), device,
                                  (mfu or reached) * device.flops(config.train.compute) / device.bfloat16)


def spread(config: Config, count: int) -> Config:
    """The config on so many devices: its mesh and its batch as often along `data` as there is room."""
    need, mesh = config.mesh.devices(), config.mesh
    if count < need:
        raise ConfigError([f"the mesh needs {need} devices; got {count}; ask for {need} or more, or set a smaller one"])
    times = count // need
    config = replace(config, mesh=replace(mesh, data=mesh.data * times, fake_devices=0),
                     data=replace(config.data, batch=config.data.batch * times))
    refuse(check(config))
    return config


def alone(config: Config) -> Config:
    """On one device, a sequence at a time."""
    return replace(config, mesh=Mesh(), data=replace(config.data, batch=1), train=replace(config.train, microbatches=1))


def params(sharded: Sharded) -> dict[str, float]:
    """Of one expert in all layers, of attention, and what inference reads (cost.decoding)."""
    sizes = {name: math.prod(shape) for name, shape in sharded.shapes.items() if sharded.learned[name]}
    experts = sum(size for name, size in sizes.items() if "expert" in axes.names(sharded.axes[name]))
    return {"per_expert": experts / sharded.config.model.moe.experts if experts else 0.0, "experts": experts,
            "attention": sum(size for name, size in sizes.items()
                             if ".attention." in name and weights.group(name) == "text"),
            "embedding": sizes.get("embedding", 0)}


def memory_of(sharded: Sharded, state: states.State) -> dict[str, float]:
    """Bytes of one device: weights, their gradients and the optimizer's state."""
    places = states.trained(sharded, states.optimizer_specs(sharded))
    return {"weights_bytes_per_device": sum(shard_bytes(sharded, name, spec) for name, spec in sharded.specs.items()),
            "gradients_bytes_per_device": sum(shard_bytes(sharded, name, spec) for name, spec in places.items()),
            "optimizer_bytes_per_device": float(sum(
                leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
                for leaf in jax.tree.leaves(state.optimizer)))}


def text(found: dict[str, Any]) -> str:
    """A plan for people."""
    params, flops, memory, best = (found[part] for part in ("params", "flops", "memory", "chinchilla"))
    parts = {part: memory[f"{part}_bytes_per_device"] for part in ("weights", "gradients", "optimizer", "activations")}
    idle, mfu, roofline = found["asked"] - found["devices"], found["mfu"], found["roofline_mfu"]
    left = f", {idle:,} of {found['asked']:,} left over" if idle else ""
    bound = "" if mfu < roofline else " (roofline: no machine is faster)" if mfu == roofline else (
        f" (more than this layout's roofline, {roofline:.1%})")

    def sizes(named: dict[str, float], between: str = ", ") -> str:
        return between.join(f"{name} {si(size)}B" for name, size in named.items())

    rows = {
        "parameters": f"{si(params['total'])}, {si(params['active'])} active; an expert {si(params['per_expert'])}, "
                      f"attention {si(params['attention'])}",
        "FLOPs of a token": f"{si(flops['forward_per_token'])} forward, {si(flops['train_per_token'])} in training",
        "devices": f"{found['devices']:,} × {found['device']}{left}",
        "memory of a device": f"{sizes(parts, ' + ')} = {si(sum(parts.values()))}B of {si(memory['device_bytes'])}B"
                              + "  DOES NOT FIT" * (not found["fits"]),
        "activations by remat": sizes(memory["activations_by_remat"]),
        "KV cache": f"{si(memory['cache_bytes_per_device'])}B of a device, for a batch in bfloat16",
        "sent in a step": sizes(found["comm"]["bytes_per_step"]) or "nothing",
        "bubble": f"{found['bubble']:.1%}",
        "step": f"{found['step_tokens']:,} tokens in {found['step_seconds']:,.3g} s; MFU {mfu:.1%}{bound}; "
                f"{found['comm']['seconds']:,.3g} s of communication",
        "training": f"{si(found['tokens'])} tokens, {flops['train_total']:.3g} FLOP: {found['days']:,.1f} days, "
                    f"{found['device_hours']:,.0f} device hours, {dollars(found)}",
        "Chinchilla": f"the same FLOPs are best spent on {si(best['parameters'])} dense parameters and "
                      f"{si(best['tokens'])} tokens; here {best['tokens_per_active']:,.1f} tokens an active parameter "
                      "(20 there)"}
    return "\n".join(f"{label:<21} {value}" for label, value in rows.items())


def dollars(found: dict[str, Any]) -> str:
    if found["dollars"] is None:
        return f"no price known of {found['device']} (add hardware='mine like={found['device']} price=…')"
    dated = f" ({found['dated']})" if found["dated"] else ""
    return f"${found['dollars']:,.0f} at ${found['price']:.2f} an hour{dated}"


def si(value: float) -> str:
    for size, word in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.4g} {word}"
    return f"{value:,.4g}"

"""A model in use: latency against throughput by batch and devices, the experts that a step reads, and speculation."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moejax.config import Config
from moejax.parallel import hardware
from moejax.plan import budget, cost
from moejax.plan.count import make_program

BATCHES = [2**power for power in range(13)]
ACCEPTANCES, DRAFTS, DRAFT_COST = (0.5, 0.6, 0.7, 0.8, 0.9), (1, 2, 4, 8), 0.05
STYLE = {"font.size": 10, "lines.markersize": 4, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "axes.titlelocation": "left", "grid.color": "#e1e5eb",
         "legend.frameon": False}


def inference(config: Config, on: str, folder: Path) -> dict[str, Any]:
    """Rooflines of decoding in bfloat16 on the devices, and on a half and twice as many; beside them a dense model of
    the same active parameters.

    Returns: {"rows": [{"devices", "batch", "seconds", "tokens_per_s", "utilisation", "experts", "worst_seconds", …}],
        "turning": {devices: batch or None}, "dense_turning", "speculation": {acceptance: {draft: gain}}, "picture"}.
    """
    device, count = hardware.named(on, config.hardware, config.mesh.devices())
    sharded, _, _ = make_program(budget.alone(config))
    found, (total, active) = budget.params(sharded), sharded.parameters()
    lookup = 0 if config.model.tied else found["embedding"]  # a token reads a row of it
    moe = {"shared": total - found["experts"] - lookup, "experts": found["experts"]}
    dense = {"shared": active - lookup, "experts": 0.0}
    context, rows = config.data.sequence, []
    counts = sorted({max(count // 2, 1), count, count * 2})
    for devices, batch in itertools.product(counts, BATCHES):
        work = config, batch, context, devices, device
        worst, plain = cost.decoding(moe, *work, worst=True), cost.decoding(dense, *work)
        rows.append({"devices": devices} | cost.decoding(moe, *work) | {
            "worst_experts": worst["experts"], "worst_seconds": worst["seconds"], "dense_seconds": plain["seconds"],
            "dense_tokens_per_s": plain["tokens_per_s"],
            "fits": (2 * total + batch * context * cost.cache_per_token(config)) / devices <= device.memory})
    result = {"device": device.name, "context": context, "rows": rows, "experts": config.model.moe.experts,
              "turning": {str(each): cost.turning(moe, config, context, each, device) for each in counts},
              "dense_turning": cost.turning(dense, config, context, count, device),
              "speculation": {str(a): {str(k): cost.speculation(a, k, DRAFT_COST) for k in DRAFTS}
                              for a in ACCEPTANCES}}
    folder.mkdir(parents=True, exist_ok=True)
    draw(result, folder / "inference.png")
    return result | {"picture": str(folder / "inference.png")}


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels, 1500 × 480: latency against throughput, experts read by batch, what speculation gains."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((15, 4.8), layout="constrained", facecolor="white", dpi=100)
        trade, experts, guess = figure.subplots(1, 3)
        for devices, colour in zip(found["turning"], ("#93b3f6", "#2563eb", "#0b2f8a"), strict=False):
            mine = [row for row in found["rows"] if str(row["devices"]) == devices]
            trade.plot([row["seconds"] * 1e3 for row in mine], [row["tokens_per_s"] / row["devices"] for row in mine],
                       "o-", color=colour, label=devices)
        trade.plot([row["dense_seconds"] * 1e3 for row in mine],
                   [row["dense_tokens_per_s"] / row["devices"] for row in mine], "--", color="#d9480f",
                   label=f"{devices}, dense")
        trade.set(xscale="log", yscale="log", xlabel="milliseconds a token of a sequence", ylabel="tokens a second and "
                  "device", title=f"Decoding at {found['context']:,} tokens; a dot per batch")
        experts.plot(BATCHES, [row["experts"] for row in mine], "o-", color="#2563eb", label="expected")
        experts.plot(BATCHES, [row["worst_experts"] for row in mine], "--", color="#d9480f", label="worst")
        experts.set(xscale="log", xlabel="sequences in a batch", title="Experts of a layer that a step reads",
                    ylim=(0, found["experts"] * 1.05))
        for draft, colour in zip(DRAFTS, ("#93b3f6", "#4f7df0", "#9b5de5", "#e0457b"), strict=True):
            guess.plot(ACCEPTANCES, [found["speculation"][str(a)][str(draft)] for a in ACCEPTANCES], "o-", color=colour,
                       label=f"{draft} guessed")
        guess.axhline(1, color="#7d8899", linewidth=1)
        guess.set(xlabel="probability that a guess is accepted", title="Speculative decoding, times as fast")
        trade.legend(title=f"{found['device']}s", loc="lower right")
        experts.legend(loc="lower right")
        guess.legend(loc="upper left")
        figure.savefig(path)


def text(found: dict[str, Any]) -> str:
    lines = [f"decoding at {found['context']:,} tokens of context in bfloat16, roofline of {found['device']}",
             f"{'devices':>7} {'batch':>6} {'ms/token':>9} {'worst':>9} {'tokens/s':>10} {'MFU':>6} {'experts':>8} "
             f"{'dense ms':>9}  limit"]
    lines += [f"{row['devices']:7} {row['batch']:6} {row['seconds'] * 1e3:9.2f} {row['worst_seconds'] * 1e3:9.2f} "
              f"{row['tokens_per_s']:10,.0f} {row['utilisation']:6.1%} {row['experts']:8.1f} "
              f"{row['dense_seconds'] * 1e3:9.2f}  {'FLOPs' if row['compute_bound'] else 'bytes'}"
              + ("" if row["fits"] else ", does not fit") for row in found["rows"]]
    lines += [f"{devices} devices: FLOPs become the limit at a batch of {batch:,}" if batch else
              f"{devices} devices: bytes stay the limit at every batch, as caches grow with it"
              for devices, batch in found["turning"].items()]
    lines.append(f"speculative decoding, a draft model of {DRAFT_COST:.0%} of the cost, times as fast: " + "; ".join(
        f"acceptance {a}: " + ", ".join(f"{gain:.2f} with {draft}" for draft, gain in gains.items())
        for a, gains in found["speculation"].items()))
    return "\n".join([*lines, found["picture"]])

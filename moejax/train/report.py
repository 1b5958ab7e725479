"""The story of a run on one page: `report.html`, which needs nothing but itself, and `report.png` for a README.

The pictures are drawn once, in the colours of `COLOURS`; in the page these are CSS variables, so that they follow the
reader's light or dark scheme.
"""

import base64
import html
import io
import math
import mimetypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moejax.config import Config, ConfigError, from_json, to_json
from moejax.parallel import schedules
from moejax.train.metrics import FILE, read_events, read_lines, read_metrics

COLOURS = {  # name: (light, dark)
    "ink": ("#1d2330", "#e4e7ee"), "soft": ("#667085", "#98a2b3"), "line": ("#e1e5eb", "#333b49"),
    "train": ("#2563eb", "#6ea0ff"), "raw": ("#93b3f6", "#41609c"), "check": ("#d9480f", "#ff8a4c"),
    "unigram": ("#7d8899", "#8b95a7")}
INK, SOFT, LINE, TRAIN, RAW, CHECK, UNIGRAM = (light for light, _ in COLOURS.values())
PAGE_COLOURS = COLOURS | {"paper": ("#ffffff", "#151a22"), "wrong": ("#ffd0b8", "#7a3413")}
# Balance is see-through, so that the map suits a light and a dark page.
LOAD = LinearSegmentedColormap.from_list(
    "load", [(0, "#1d6fdcff"), (0.5, "#1d6fdc00"), (0.5, "#e0500a00"), (1, "#e0500aff")]).with_extremes(bad="#88888899")
DEPTH = LinearSegmentedColormap.from_list("depth", ["#0e9f8e", "#4f7df0", "#9b5de5", "#e0457b"])
LAYERS = 8  # at most this many layers are drawn
COLUMNS = 200  # of a heat map
ticks = partial(MaxNLocator, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)  # round whole numbers
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "moejax", "font.size": 10, "axes.titlesize": 10,
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.axisbelow": True, "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "axes.titlecolor": INK,
         "axes.facecolor": "none", "grid.color": LINE, "text.color": INK, "xtick.color": LINE, "ytick.color": LINE,
         "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "legend.frameon": False, "lines.linewidth": 1.6,
         "path.simplify_threshold": 1.0}  # points that nobody could see are left out of a long curve


@dataclass
class Run:
    """A run folder, read."""

    config: Config
    records: list[dict[str, Any]]
    summary: dict[str, Any]  # with what was measured of the pipeline
    samples: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def series(self, key: str) -> np.ndarray:
        """A number per step, nan where a step has none."""
        return np.array([record.get(key) for record in self.records], float)

    def layers(self, key: str) -> np.ndarray:
        """The lists per MoE layer as [step, layer, ...]; of size 0 for a dense model."""
        return np.array([record.get(key) or [] for record in self.records], float)

    def shown(self) -> list[tuple[int, str]]:
        """(row in the lists per MoE layer, name) of the layers to draw, chosen evenly over the depth."""
        count = self.layers("drop_fraction").shape[1]
        places = [place for place, kind in enumerate(self.config.model.layer_kinds()) if kind == "M"]
        rows = np.unique(np.linspace(0, count - 1, min(count, LAYERS)).round().astype(int))
        return [(int(row), f"layer {places[row]}") for row in rows]


def write_report(run_dir: Path) -> Path:
    """Writes report.html, whose path it returns, and report.png.  Raises ConfigError: no run folder, or not trained."""
    run_dir, run = Path(run_dir), read_run(Path(run_dir))
    path = run_dir / "report.html"
    with matplotlib.rc_context(STYLE):
        path.write_bytes(page(run, figures(run)).encode("utf-8", "replace"))
        poster(run, run_dir / "report.png")
    return path


def read_run(run_dir: Path) -> Run:
    config_file = run_dir / "config.json"
    if not config_file.is_file():
        near = sorted(str(other.parent) for other in run_dir.parent.glob("*/config.json"))
        hint = f", such as {', '.join(near[:3])}" if near else ""
        missing = "has no config.json" if run_dir.is_dir() else "does not exist"
        raise ConfigError([f"a report is of a run folder; {run_dir} {missing}; give a training run's run_dir{hint}"])
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError([
            f"a report needs a step; {run_dir / FILE} holds none; train first: moejax train CONFIG run_dir={run_dir}"])
    try:
        config = from_json(config_file.read_text("utf-8"))
    except ConfigError as error:
        raise ConfigError([f"{config_file} cannot be read: {problem}" for problem in error.problems]) from None
    summary = {key: value for name in ("summary.json", "pipeline.json") for found in read_lines(run_dir / name)
               for key, value in found.items()}
    return Run(config, records, summary, read_lines(run_dir / "samples.jsonl"), read_events(run_dir))


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a 25th of the run around every step, less at its steep beginning; what is not finite stays out."""
    at, finite = np.arange(len(values)), np.isfinite(values)
    reach = np.minimum(at, len(values) // 50)
    begin, end = at - reach, np.minimum(at + reach + 1, len(values))
    total, count = (np.concatenate(([0], np.cumsum(terms))) for terms in (np.where(finite, values, 0), finite))
    return np.where(finite, (total[end] - total[begin]) / np.maximum(count[end] - count[begin], 1), np.nan)


def curve(axes: Axes, steps: np.ndarray, values: np.ndarray, **looks: Any) -> None:
    """A line with the axes' common manners; a run of one step is a dot."""
    axes.plot(steps, values, marker="o" if len(steps) == 1 else None, markersize=5, **looks)
    margin = 0.03 * (steps[-1] - steps[0]) or 1  # the whole run, also where its values are not finite
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.xaxis.set_major_locator(ticks(7))


def smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, **looks: Any) -> None:
    """What is measured, and its course."""
    if len(steps) > 1:
        curve(axes, steps, values, color=RAW, linewidth=0.7)
    curve(axes, steps, smooth(values), color=TRAIN, **looks)


def draw_loss(fig: FigureBase, run: Run) -> None:
    axes, steps, validation = fig.subplots(), run.series("step"), run.series("validation_loss")
    smoothed(axes, steps, run.series("loss"), label="training")
    seen = np.isfinite(validation)
    if seen.any():
        axes.plot(steps[seen], validation[seen], "o-" if seen.sum() <= 40 else "-", color=CHECK, markersize=4,
                  linewidth=1.2, label="validation")
    if (unigram := middle(run.series("unigram_loss"))) is not None:
        axes.axhline(unigram, color=UNIGRAM, linestyle="--", linewidth=1.2, label="unigram model")
    axes.set(title="Loss, nats per token", xlabel="step")
    axes.legend()


def draw_load(fig: FigureBase, run: Run) -> None:
    shown, steps, load = run.shown(), run.series("step"), run.layers("expert_load")
    parts = np.array_split(load * load.shape[2], min(len(steps), COLUMNS))  # in multiples of an even share
    load = np.stack([part.mean(0) for part in parts], axis=2)  # [layer, expert, column]
    strayed = np.nan_to_num(np.abs(load[[row for row, _ in shown]] - 1))
    reach = np.clip(np.ceil(np.quantile(strayed, 0.99) * 10) / 10, 0.1, 1)
    across = 2 if len(shown) > 1 else 1
    panels = fig.subplots(-(-len(shown) // across), across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(shown):]:
        axes.set_visible(False)
    for axes, (row, name) in zip(panels.flat, shown, strict=False):
        image = axes.imshow(load[row], cmap=LOAD, norm=Normalize(1 - reach, 1 + reach), aspect="auto", origin="lower",
                            interpolation="none", extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, load.shape[1] - 0.5))
        image.set_gid(f"map-{row}")
        axes.set_title(name)
        axes.grid(False)
        axes.xaxis.set_major_locator(ticks(4))
        axes.yaxis.set_major_locator(ticks(4))
    fig.supxlabel("step", color=SOFT, fontsize=10)
    fig.supylabel("expert", color=SOFT, fontsize=10)
    bar = fig.colorbar(image, ax=panels, location="top", aspect=40, shrink=0.8, extend="both",
                       ticks=np.linspace(1 - reach, 1 + reach, 5), format="%.2f")
    bar.set_label("tokens per expert, 1 is an even share", color=INK)
    bar.outline.set_visible(False)


def draw_drops(fig: FigureBase, run: Run) -> None:
    axes, steps, drops = fig.subplots(), run.series("step"), run.layers("drop_fraction")
    for place, (row, name) in enumerate(run.shown()):
        curve(axes, steps, smooth(drops[:, row]), label=name, color=DEPTH(place / max(len(run.shown()) - 1, 1)))
    axes.set(title="Tokens dropped, smoothed", xlabel="step")
    axes.set_ylim(0, max(axes.get_ylim()[1] * 1.35, 0.001))  # with room for the legend
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper right", ncols=4, handlelength=1, handletextpad=0.4, columnspacing=1)


def draw_series(fig: FigureBase, run: Run, **titles: str) -> None:
    """Series by their key, one above the other."""
    steps, panels = run.series("step"), fig.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        smoothed(axes, steps, run.series(key))
        axes.set(title=title, ylim=(0, max(axes.get_ylim()[1] * 1.05, 1e-9)))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
    panels[-1].set_xlabel("step")


draw_optimizer = partial(draw_series, lr="Learning rate", grad_norm="Gradient norm, before clipping")
draw_router = partial(draw_series, balance_loss="Balance loss", z_loss="Router z-loss")
draw_speed = partial(draw_series, tokens_per_s="Tokens per second")
DRAWINGS: dict[Callable[[FigureBase, Run], None], str] = {  # and what they show; on a wide page in two columns
    draw_loss: "Training and validation loss over the steps",
    draw_drops: "Share of the tokens that no expert had room for, per MoE layer",
    draw_optimizer: "Learning rate and gradient norm over the steps",
    draw_load: "Load of every expert over the steps, a map per MoE layer",
    draw_router: "Balance loss and router z-loss over the steps",
    draw_speed: "Tokens per second over the steps"}


def figures(run: Run) -> str:
    """The drawings as <figure>s with inline SVG, narrow enough to stay readable on a phone."""
    made = ""
    for number, (draw, words) in enumerate(DRAWINGS.items()):
        if draw in (draw_load, draw_drops, draw_router) and not run.shown():
            continue
        height = 1.2 + 0.55 * max(len(run.shown()), 4) if draw is draw_load else 3.4 if draw is draw_loss else 2.9
        fig, out = Figure((5.2, height), layout="constrained"), io.StringIO()
        draw(fig, run)
        fig.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = out.getvalue()
        for mark in ('id="', "url(#", 'href="#'):  # ids must differ between the figures of a page
            svg = svg.replace(mark, f"{mark}{number}-")
        for name, (light, _) in COLOURS.items():
            svg = svg.replace(light, f"var(--{name})")
        made += inline(svg, words)
    return made


def inline(svg: str, words: str) -> str:
    """The text of an SVG file as a <figure> of a page."""
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg"):])
    return f'<figure>{svg.replace("<svg", f"""<svg role="img" aria-label="{words}" """, 1)}</figure>\n'


def poster(run: Run, path: Path) -> None:
    """The picture for a README, 1200 × 700: the loss beside the experts, or beside the optimizer if dense."""
    fig = Figure((12, 7), layout="constrained", facecolor="white", dpi=100)
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    left, right = fig.subfigures(1, 2)
    if run.shown():
        top, bottom = left.subfigures(2, 1, height_ratios=(3, 2))
        draw_loss(top, run)
        draw_drops(bottom, run)
        draw_load(right, run)
    else:
        draw_loss(left, run)
        draw_optimizer(right, run)
    fig.savefig(path)


def facts(run: Run) -> list[tuple[str, str]]:
    """The summary: (label, value) of what the run has."""
    last, mesh, unigram = run.records[-1], run.config.mesh, middle(run.series("unigram_loss"))
    validation = [record["validation_loss"] for record in run.records if "validation_loss" in record][-1:]
    rows = [("Steps", f"{last['step']:,} of {run.config.train.steps:,}"),
            ("Tokens", large(last.get("tokens"))), ("Final training loss", losses(run, last.get("loss"))),
            ("Validation loss", losses(run, *validation) if validation else ""),
            ("Unigram loss", losses(run, unigram) if unigram else ""),
            ("Validation / unigram", f"{validation[0] / unigram:.3f}" if unigram and any(validation) else ""),
            ("Tokens per second, median", large(middle(run.series("tokens_per_s")))),
            ("Model FLOP/s utilisation", share(middle(run.series("mfu")))), ("Goodput", share(last.get("goodput"))),
            ("Steps skipped", f"{last['skipped']:,}" if last.get("skipped") else ""),
            ("Gone back", ", ".join(f"from step {one['step']:,} to {one['to']:,}" for one in run.events)),
            ("Mesh", mesh.words()), ("Parameters", large(run.summary.get("parameters"))),
            ("Active parameters", large(run.summary.get("active_parameters"))),
            ("Pipeline", f"{mesh.schedule}, {run.config.train.microbatches} microbatches" if mesh.pipeline > 1 else ""),
            ("Bubble, counted", share(run.summary.get("bubble"))),
            ("Bubble, measured", share(run.summary.get("bubble_measured"))),
            *((label, str(run.summary.get(label.lower(), ""))) for label in ("Devices", "JAX", "Python"))]
    return [(label, value) for label, value in rows if value]


def losses(run: Run, nats: float | None) -> str:
    """A loss in nats, and in bits per byte where a token is a byte."""
    if nats is None:
        return "not finite"
    bits = f"\n{nats / math.log(2):.3f} bits per byte" if run.config.data.tokenizer == "bytes" else ""
    return f"{nats:.4f} nats{bits}"


def middle(values: np.ndarray) -> float | None:
    """The median of what is finite."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else None


def share(value: float | None) -> str:
    return f"{value:.1%}" if value else ""


def large(value: float | None) -> str:
    """12,345, or 12.3 million."""
    if value is None:
        return ""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.4g} {word}"
    return f"{value:,.0f}"


CSS = """
:root{color-scheme:light dark;%s}
@media (prefers-color-scheme:dark){:root{%s}}
body{margin:0 auto;max-width:76rem;padding:1.5rem 1rem 3rem;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{margin:0;overflow-wrap:anywhere} p,dt{color:var(--soft)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:0 1.5rem}
dl div{border-top:1px solid var(--line);padding:.45rem 0} dt{font-size:.8rem}
dd{margin:0;white-space:pre-line;font-variant-numeric:tabular-nums}
main{columns:2 24rem;column-gap:1.25rem}
figure,pre{margin:0 0 1.25rem;border:1px solid var(--line);border-radius:.6rem;padding:.7rem;break-inside:avoid}
svg{display:block;width:100%%;height:auto} svg text{font-family:inherit!important}
pre,.samples dd{white-space:pre-wrap;overflow-wrap:anywhere;font:.85rem/1.5 ui-monospace,Menlo,Consolas,monospace}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%%,17.5rem),1fr));gap:1.25rem}
.samples figure,.samples pre{margin:0} .samples pre{grid-column:1/-1} .samples dl{display:block;margin:.5rem 0 0}
img{display:block;width:16rem;max-width:100%%;margin:0 auto;image-rendering:pixelated}
mark{background:var(--wrong);color:inherit} pre b{color:var(--train)}
summary{cursor:pointer;font-weight:600;margin:1.5rem 0 .75rem}
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{name} · moejax</title><style>{css}</style></head><body>
<h1>{name}</h1><p>{shape}</p>
<dl>{facts}</dl>
<main>
{figures}</main>
{schedule}{samples}<details><summary>Configuration</summary><pre>{config}</pre></details>
</body></html>
"""


def page(run: Run, figures: str) -> str:
    """The whole document; the policy in its head forbids scripts and anything from outside."""
    light, dark = ("".join(f"--{name}:{pair[scheme]};" for name, pair in PAGE_COLOURS.items()) for scheme in (0, 1))
    model, moe = run.config.model, run.config.model.moe
    experts = f"{moe.active} of {moe.experts} experts a token" if "M" in model.layer_kinds() else "dense"
    shape = (f"{model.layers} layer{'s'[model.layers == 1:]}, width {model.d_model}, {experts}, "
             f"{run.config.data.sequence} tokens a sequence")
    rows = "".join(f"<div><dt>{label}</dt><dd>{html.escape(value)}</dd></div>" for label, value in facts(run))
    samples = "".join(map(sample, run.samples))
    samples = samples and f'<h2>Samples</h2>\n<div class="samples">\n{samples}</div>\n'
    return PAGE.format(name=html.escape(run.config.name), css=CSS % (light, dark), shape=shape, facts=rows,
                       figures=figures, schedule=gantt(run), samples=samples, config=html.escape(to_json(run.config)))


def gantt(run: Run) -> str:
    """The schedule of a pipeline as a picture, or nothing."""
    if run.config.mesh.pipeline == 1:
        return ""
    try:
        table = schedules.make(run.config)
    except ConfigError:  # a CSV table that is not there any more
        return ""
    words = (f"{schedules.describe(table)}. Time runs to the right: blue are forwards, green gradients of inputs (and "
             "of weights, where there is no orange), orange gradients of weights.")
    if "step_s" in run.summary:
        words += (f" Measured: a step's gradients take {run.summary['step_s']:.3g} s, the same ops without idle ticks "
                  f"{run.summary['busy_s']:.3g} s.")
        if run.config.mesh.fake_devices:
            words += " Fake devices share the cores: what one leaves idle, another uses."
    return f"<h2>Pipeline</h2>\n<p>{html.escape(words)}</p>\n{inline(table.svg(), 'What every stage does over time')}"


def shown(raw: str) -> str:
    return html.escape("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in raw))


def sample(found: dict[str, Any]) -> str:
    """A text after its prompt; or pictures beside their text, what was read, and what was guessed of black ones."""
    prompt, text, truth, blind = (str(found.get(key, "")) for key in ("prompt", "text", "truth", "blind"))
    if not found.get("images"):
        return f"<pre><b>{shown(prompt)}</b>{shown(text.removeprefix(prompt))}</pre>\n"
    if "truth" not in found:
        texts = {"prompt": shown(prompt), "answer": shown(text)}
    else:
        texts = {"truth": shown(truth), "read": marked(text, truth)}
        texts |= {"blind": marked(blind, truth)} if "blind" in found else {}
    rows = "".join(f"<div><dt>{label}</dt><dd>{text}</dd></div>" for label, text in texts.items())
    return f'<figure>{"".join(map(picture, found["images"]))}<dl>{rows}</dl></figure>\n'


def picture(path: Any) -> str:
    """A picture file as a part of the page; nothing where it is gone."""
    kind = mimetypes.guess_type(str(path))[0] or ""
    if not kind.startswith("image/") or not Path(path).is_file():
        return ""
    return f'<img alt="" src="data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}">'


def marked(text: str, truth: str) -> str:
    """A text with the characters marked that differ from those at the same place of the truth."""
    parts = []
    for wrong, stretch in groupby(enumerate(text), lambda each: truth[each[0]:each[0] + 1] != each[1]):
        part = shown("".join(char for _, char in stretch))
        parts.append("<mark>" + part.replace("\n", "\u23ce\n") + "</mark>" if wrong else part)
    return "".join(parts) + "<mark>\u2026</mark>" * (len(text) < len(truth))  # it ends too early

"""The whole configuration: a frozen, hashable, typed tree, loaded from a small Python file.

Sits at the bottom of the package and imports nothing of it (nor jax), so that every command can read a
config at once.  `load_config` runs `config()` of a Python file, applies `path.to.field=value` overrides
typed from the annotations, and reports every problem of both in one `ConfigError`.
"""

import dataclasses
import difflib
import json
import math
import runpy
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

AXES = ("data", "fsdp", "pipeline", "expert", "tensor")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble")  # made in parallel/schedules.py
# The fields of a model that are texts, "kind name=value …": the kinds, and what each can say, with what holds where it
# is not said.  `...` must be said, and None need not.
SIZES = dict.fromkeys(("size", "patch", "width", "layers", "heads", "hidden"), ...)
# Which images a token looks at, and how: `latents` of an image (0: all its patches) by a resampler of `depth` layers
# with `heads` of size `head`; `frames` of a video; `feed` is what passes the gated MLP; `gate` is a number or a vector;
# `norm` and `latent_norm` are of queries and keys.
CROSS = {"latents": 0, "depth": 2, "heads": 8, "head": 64, "frames": 1, "feed": "seen", "gate": "number",
         "norm": "none", "latent_norm": "none"}
TEXTS: dict[str, dict[str, dict[str, Any]]] = {
    "rope_scaling": {
        "linear": {"factor": ...}, "dynamic": {"factor": ..., "original": ...},
        "llama3": {"factor": ..., "low": ..., "high": ..., "original": ...},
        "yarn": {"factor": ..., "original": ..., "fast": None, "slow": None, "attention": None, "truncate": None}},
    "vision": {
        "clip": SIZES | {"eps": 1e-5, "act": "quick_gelu", "fit": "crop", "pool": 0, "grid": 0,
                         "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
        "siglip": SIZES | {"eps": 1e-6, "act": "gelu", "fit": "squash", "pool": 0, "grid": 0,
                           "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}},
    "cross": {"last": CROSS, "all": CROSS}}  # images of the same document before the token
CROSSED = {"V": "M", "W": "D", "v": "m", "w": "d"}  # letters of layers with cross-attention -> without
SHARES = ("validation", "decay", "final_lr", "b1", "b2", "jitter")  # fields between 0 and 1
ZERO = {*SHARES, *"layers shared scale mixer_gap balance_loss z_loss bias_rate fake_devices images seed warmup "
        "weight_decay clip keep_every".split()}  # fields whose number may be 0


class ConfigError(ValueError):
    """Everything wrong with what the user asked for; `problems` holds one message per rule broken."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


def refuse(problems: list[str]) -> None:
    """Raises ConfigError with these problems, if there are any."""
    if problems:
        raise ConfigError(problems)


def require(rules: dict[str, Any]) -> None:
    """Raises ConfigError with every message whose rule does not hold."""
    refuse([message for message, holds in rules.items() if not holds])


@dataclass(frozen=True)
class MoE:
    """Mixture-of-experts layers.  A routing group is `group` tokens of one sequence and never spans devices."""

    experts: int = 8
    active: int = 2  # k: experts a token is sent to
    hidden: int = 256  # width of one expert
    shared: int = 0  # width of the expert that every token passes, side by side with the routed ones
    shared_gate: bool = False  # the shared expert's output is scaled by a sigmoid of its own
    router: Literal["topk", "sigmoid", "sparsemixer", "expert_choice"] = "topk"
    softmax: Literal["before", "after"] = "before"  # the choice of the k experts (router topk)
    renormalise: bool = True  # the k combine weights sum to 1
    scale: float = 1.0  # factor on the combine weights
    expert_groups: int = 1  # group-limited routing: experts in this many groups,
    active_groups: int = 1  # of which a token may use this many
    group: int | None = None  # tokens in a routing group; None is the whole sequence
    capacity_factor: float | None = 1.25  # None is dropless
    eval_capacity_factor: float | None = None
    priority: Literal["position", "score"] = "position"  # who keeps a seat when an expert is full
    jitter: float = 0.0  # router inputs are multiplied by uniform(1 - jitter, 1 + jitter) in training
    mixer_gap: float = 0.01  # relative half-distance to the best logit, beyond which sparsemixer sees no expert
    balance_loss: float = 0.01  # coefficient
    balance_scope: Literal["group", "batch"] = "group"
    z_loss: float = 0.001  # coefficient
    bias_rate: float = 0.001  # step of the balancing bias (router sigmoid)
    dispatcher: Literal["sorted", "blocked", "einsum"] = "sorted"


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer.

    `pattern` is repeated over the layers: M is a MoE layer, D a dense one; in m and d attention sees only a window.
    V, W, v and w are the same with gated cross-attention to images before them.
    """

    layers: int = 4
    pattern: str = "M"
    d_model: int = 256
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 32
    hidden: int = 1024  # of dense layers
    activation: Literal["gelu", "gelu_exact", "quick_gelu", "relu", "swiglu", "geglu", "clamped_swiglu"] = "swiglu"
    clamp: tuple[float, ...] = (1.702, 7.0)  # of clamped_swiglu: slope of the sigmoid, largest entry
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: str = ""  # "linear factor=2"; what this, vision and cross can say stands in TEXTS
    window: int | None = None  # tokens that a layer m or d looks at, itself included
    latent: tuple[int, ...] = ()  # latent attention: ranks of queries (0: none) and keys, turned part, value size
    qk_norm: Literal["none", "head", "all"] = "none"  # of queries and keys, each head for itself or all together
    qkv_limit: float | None = None  # queries, keys and values are clipped to it
    biases: tuple[Literal["qkv", "output", "sinks", "mlp", "experts", "router", "norm", "head"], ...] = ()
    caps: tuple[float, ...] = ()  # soft caps of attention scores and of logits, 0 for none
    multipliers: tuple[float, ...] = ()  # of embeddings, of what layers add, of attention scores (0: usual), of logits
    vocab: int = 264
    tied: bool = False
    vision: str = ""  # the image encoder: "clip size=224 patch=14 width=1024 layers=24 heads=16 hidden=4096"
    cross: str = ""  # how text looks at images: "last latents=64 depth=6 heads=16 head=96"
    moe: MoE = field(default_factory=MoE)

    def layer_letters(self) -> str:
        """One letter per layer: the pattern repeated to `layers` letters."""
        return (self.pattern * self.layers)[: self.layers]

    def layer_kinds(self) -> str:
        """M or D per layer."""
        return self.layer_letters().translate(str.maketrans(CROSSED)).upper()

    def encoder(self) -> SimpleNamespace | None:
        """What `vision` says, with `kind`; None without.  Raises ValueError on other text."""
        return spelled("vision", self.vision)

    def looks(self) -> SimpleNamespace | None:
        """What `cross` says, with `kind`; None without.  Raises ValueError on other text."""
        return spelled("cross", self.cross)

    def rope(self) -> tuple[str, dict[str, float]]:
        """The kind of rotary scaling ("" for none) and its numbers.  Raises ValueError on other text."""
        found = spelled("rope_scaling", self.rope_scaling) or SimpleNamespace(kind="")
        return found.kind, {name: value for name, value in vars(found).items() if name != "kind"}


@dataclass(frozen=True)
class Mesh:
    """Length of every mesh axis; the product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    pipeline: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: bool = False  # activations between blocks are split over `tensor` along the sequence
    zero1: bool = False  # optimizer state is split over `data`
    schedule: str = "1f1b"  # of the pipeline: 1f1b, gpipe, interleaved, zero_bubble, or a CSV table
    chunks: int = 1  # parts of the model on every stage (interleaved)
    stage_layers: tuple[int, ...] = ()  # of every part of the model in order; empty is an even split
    fake_devices: int = 0  # this many CPU devices, shared out over the processes; 0 uses what the machine has

    def lengths(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def words(self) -> str:
        """The axes that are in use, as people read them."""
        return " × ".join(f"{axis} {n}" for axis, n in self.lengths().items() if n > 1) or "one device"

    def devices(self) -> int:
        return math.prod(self.lengths().values())

    def batch_shards(self) -> int:
        return self.data * self.fsdp * self.expert

    def parts(self) -> int:
        """Into how many the layers are cut: part i is chunk i // pipeline of stage i % pipeline."""
        return self.pipeline * self.chunks


@dataclass(frozen=True)
class Data:
    """Text in, batches out.  A batch is a function of (seed, step) alone."""

    sources: tuple[str, ...] = ("stdlib",)  # files, folders, globs, .jsonl[.gz|.zst], .tar, or "stdlib"
    tokenizer: str = "bytes"  # or the path of a tokenizer.json or of its folder; "" is none, for use without text
    sequence: int = 256  # tokens
    batch: int = 16  # sequences in a step, over all devices and microbatches
    images: int = 0  # of a sequence at most; 0 is text alone
    rate: float = 1.0  # frames taken of a second of video
    validation: float = 0.02  # share of the documents
    seed: int = 0
    cache: str = "runs/cache"


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: float = 3e-4
    schedule: Literal["cosine", "wsd", "rsqrt"] = "cosine"
    warmup: int = 100  # steps
    decay: float = 0.2  # share of the steps in which wsd goes down
    final_lr: float = 0.1  # as a share of lr
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # global norm; 0 is off


@dataclass(frozen=True)
class Checkpoint:
    every: int = 200  # steps
    keep: int = 2  # of the newest
    keep_every: int = 0  # steps; those of a multiple are kept for good, 0 keeps none so
    folder: str = ""  # run_dir/checkpoints when empty; gs:// and s3:// work too


@dataclass(frozen=True)
class Fault:
    """What a run does about steps that go wrong."""

    loss_spike: float | None = 2.0  # × the running mean; a step above it is skipped, as one that is not finite
    norm_spike: float | None = 10.0  # the same for the gradient norm
    limit: int = 5  # skipped in a row, then the run goes back to a checkpoint and past the data
    stall: float = 300.0  # seconds in a step, then the watchdog speaks
    heartbeat: int = 60  # seconds without a sign of life, then the other processes end


@dataclass(frozen=True)
class Train:
    steps: int = 400
    init: str = ""  # run folders whose weights this run begins with, separated by commas; fresh ones when empty
    freeze: tuple[Literal["text", "encoder"], ...] = ()  # what is not trained
    microbatches: int = 1
    seed: int = 0
    compute: Literal["bfloat16", "float32"] = "float32"
    remat: Literal["none", "weights", "dots", "full"] = "none"  # what is made again for the backward pass
    eval_every: int = 100  # steps
    eval_batches: int = 8
    log_every: int = 10  # steps between lines on the terminal
    fault: Fault = field(default_factory=Fault)


@dataclass(frozen=True)
class Config:
    name: str = ""  # the config file's name when empty
    run_dir: str = ""  # runs/<name> when empty
    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    hardware: tuple[str, ...] = ()  # devices for `moejax plan`, added to those of parallel/hardware.py


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a Python file that defines `config() -> Config`.

    Args:
        path: the file, e.g. "configs/demo.py", or the config.json of a run.
        overrides: "path.to.field=value" strings; a value is read by the field's annotation.
    Raises:
        ConfigError: the file is missing or gives no Config, or any override or rule is wrong (all at once).
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        near = nearest(path.name, [other.name for other in path.parent.glob("*.py")], f"{path.parent}/")
        raise ConfigError([f"a config is a Python file; {path} {what}{near}"])
    try:
        if path.suffix == ".json":
            config = from_json(path.read_text())
        else:
            make = runpy.run_path(str(path)).get("config")
            config = make() if callable(make) else None
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise ConfigError([f"{path} gives no config: {type(error).__name__}: {error}"]) from error
    if not isinstance(config, Config):
        raise ConfigError([f"a config file defines config(), which returns a Config; that of {path} gives {config!r}"])
    config = checked(config, overrides)
    name = config.name or path.stem
    return replace(config, name=name, run_dir=config.run_dir or f"runs/{name}")


def checked(config: Config, overrides: Sequence[str] = ()) -> Config:
    """The config with overrides.  Raises ConfigError: everything wrong with them and with it."""
    config, problems = override(config, overrides)
    refuse(problems + check(config))
    return config


def override(config: Config, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config with "path.to.field=value" applied, and the problems of those that could not be."""
    problems, fields = [], dict(leaves(config))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            problems.append(f"an override is path.to.field=value; got {text!r}")
        elif path not in fields:
            problems.append(unknown(path, fields))
        else:
            try:
                config = put(config, path.split("."), form(fields[path][0]).value(path, value))
            except ValueError as error:
                problems.append(str(error))
    return config, problems


def unknown(path: str, fields: Iterable[str]) -> str:
    """What is wrong with a path that is none of the fields."""
    if inside := [name for name in fields if name.startswith(f"{path}.")]:
        return f"{path} is a group of fields; set one of {', '.join(inside)}"
    alike = [name for name in fields if name.split(".")[-1] == path.split(".")[-1]]
    hint = nearest(path, alike, cutoff=0) or nearest(path, fields, cutoff=0.5) or f"; fields are {', '.join(fields)}"
    return f"unknown field {path!r}{hint}"


def nearest(name: str, names: Iterable[str], before: str = "", cutoff: float = 0.6) -> str:
    """A hint for a message; empty where nothing is like the name."""
    near = difflib.get_close_matches(name, list(names), 1, cutoff)
    return f"; did you mean {before}{near[0]}?" if near else ""


hints = cache(typing.get_type_hints)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted path, (annotation, value)) of every field that is not itself a tree."""
    for name, kind in hints(type(node)).items():
        value = getattr(node, name)
        if type(value) is kind and dataclasses.is_dataclass(kind):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, (kind, value)


def put(node: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = put(getattr(node, path[0]), path[1:], value)
    return replace(node, **{path[0]: value})


class Form(NamedTuple):
    """Values of one kind: what messages call them, how a text is read as one, and which values are."""

    words: str
    read: Callable[[str], Any]
    holds: Callable[[Any], bool]

    def value(self, name: str, text: str) -> Any:
        """The value that a text spells.  Raises ValueError, with a message about `name`, if it spells none."""
        with suppress(ValueError):
            if self.holds(value := self.read(text)):
                return value
        raise ValueError(f"{name} takes {self.words}; got {text!r}")


@cache
def form(kind: Any) -> Form:
    """That of the values of an annotation."""
    inside = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return Form(f"one of {', '.join(inside)}", str, inside.__contains__)
    if inside:  # X | None, or tuple[X, ...]
        words, read, holds = form(inside[0])
        if typing.get_origin(kind) is types.UnionType:
            return Form(f"{words} or none", lambda text: None if text.lower() in ("none", "null") else read(text),
                        lambda value: value is None or holds(value))
        return Form(f"values separated by commas, each {words}",
                    lambda text: tuple(read(part) for part in text.strip("[]()").split(",") if part),
                    lambda value: isinstance(value, tuple) and all(map(holds, value)))
    words, read = {int: ("a whole number", int), float: ("a number", float), str: ("text", str), bool: (
        "true or false", lambda text: {"true": True, "1": True, "false": False, "0": False}.get(text.lower()))}.get(
            kind, (f"a moejax.config.{kind.__name__}", None))
    some = (int, float) if kind is float else kind
    return Form(words, read, lambda value: isinstance(value, some) and (kind is bool or not isinstance(value, bool)))


PARTS = {name: form for names, form in {  # of the texts in TEXTS
    "size patch width layers heads hidden depth head frames": Form("a whole number above 0", int, lambda x: x > 0),
    "pool grid latents truncate": Form("a whole number, 0 or above", int, lambda x: x >= 0),
    "factor original low high fast slow attention eps": Form("a number above 0", float, lambda x: 0 < x < math.inf),
    "mean": Form("three numbers", form(tuple[float, ...]).read, lambda x: len(x) == 3 and math.isfinite(sum(x))),
    "std": Form("three numbers above 0", form(tuple[float, ...]).read,
                lambda x: len(x) == 3 and min(x) > 0 and math.isfinite(sum(x))),
    "act": form(Literal["quick_gelu", "gelu", "gelu_exact", "relu"]), "fit": form(Literal["crop", "squash"]),
    "feed": form(Literal["seen", "every"]), "gate": form(Literal["number", "vector"]),
    "norm latent_norm": form(Literal["none", "head"])}.items() for name in names.split()}


@cache
def spelled(field: str, text: str) -> SimpleNamespace | None:
    """What a text of TEXTS says, with its `kind`; None if it is empty.  Raises ValueError with a message on others."""
    if not text.strip():
        return None
    kinds, (kind, *parts) = TEXTS[field], text.split()
    if kind not in kinds:
        raise ValueError(f"model.{field} is empty or begins with {', '.join(kinds)}; got {text!r}")
    given = [part.partition("=")[::2] for part in parts]
    names, values = [name for name, _ in given], dict(kinds[kind])
    if odd := [name for name in names if name not in values or names.count(name) > 1]:
        raise ValueError(f"model.{field}={kind} takes each of {', '.join(values)} once; got {odd[0]!r} in {text!r}")
    values |= {name: PARTS[name].value(f"{name}= of model.{field}", value) for name, value in given}
    if missing := [f"{name}=" for name, value in values.items() if value is ...]:
        raise ValueError(f"model.{field}={kind} needs {', '.join(missing)}; got {text!r}")
    return SimpleNamespace(kind=kind, **{name: value for name, value in values.items() if value is not None})


def check(config: Config) -> list[str]:
    """Every rule that the config breaks: the rule, both values, the repair.  Empty when it is good."""
    fields, unread = list(leaves(config)), []
    if wrong := [f"{path} takes {form(kind).words}; got {value!r}" for path, (kind, value) in fields
                 if not form(kind).holds(value)]:
        return wrong  # the rules below compute with the values
    for name in TEXTS:
        try:
            spelled(name, getattr(config.model, name))
        except ValueError as error:
            unread.append(str(error))
            config = put(config, ["model", name], "")
    rules = [check_model, check_attention, check_moe, check_divisions, check_mesh, check_pipeline]
    rules += [check_vision] * (not unread)
    return [*check_ranges(fields), *unread, *(problem for rule in rules for problem in rule(config))]


def check_ranges(fields: list[tuple[str, tuple[Any, Any]]]) -> Iterator[str]:
    for path, (kind, value) in fields:
        if kind is bool or not isinstance(value, (int, float)):
            continue
        name, whole = path.rpartition(".")[2], isinstance(value, int)
        if not whole and not math.isfinite(value):
            yield f"{path} must be finite; got {value}"
        elif name in SHARES and not 0 <= value <= 1:
            yield f"{path} must lie between 0 and 1; got {value}"
        elif name in ("b1", "b2") and value == 1:
            yield f"{path} must be below 1, or nothing new is learned; got {value}"
        elif name in ZERO and value < 0:
            yield f"{path} must not be negative; got {value}"
        elif name not in ZERO and value <= 0:
            yield f"{path} must be above 0; got {value}" + "; set it to 1 or more" * whole
        elif whole and value >= 2**31:
            yield f"{path} must be below 2**31, as it is counted in 32 bits; got {value}"


def check_model(config: Config) -> Iterator[str]:
    model = config.model
    if not model.pattern or not set(model.pattern.upper()) <= set("MDVW"):
        yield ("model.pattern is made of M (MoE layer) and D (dense layer), or V and W where they look at images, "
               f"small where attention has a window; got {model.pattern!r}")
    if model.window is None and set(model.layer_letters()) & set("mdvw"):
        yield f"small letters need model.window; got pattern {model.pattern!r} and no window; set it, or use capitals"
    if model.head_dim % 2:
        yield f"model.head_dim must be even for the rotary embedding; got {model.head_dim}"
    if config.data.tokenizer == "bytes" and model.vocab < 257:
        yield f"model.vocab must hold the byte tokenizer's 257 tokens; got {model.vocab}; set model.vocab=264"
    for name, lengths in {"clamp": (2,), "latent": (0, 4), "caps": (0, 2), "multipliers": (0, 4)}.items():
        numbers = getattr(model, name)
        if len(numbers) not in lengths or not all(0 <= x < math.inf for x in numbers):
            yield f"model.{name} has {' or '.join(map(str, lengths))} numbers, finite and not negative; got {numbers}"
    if len(set(model.biases)) < len(model.biases):
        yield f"model.biases names each part once; got {', '.join(model.biases)}"
    if 0 < model.rope_theta <= 1:
        yield f"model.rope_theta must be above 1; got {model.rope_theta}; set it to 10000"


def check_attention(config: Config) -> Iterator[str]:
    """Rotary scaling and latent attention."""
    model, (kind, numbers) = config.model, config.model.rope()
    _, rank, turned, size = model.latent if len(model.latent) == 4 else (0, 0, model.head_dim, 0)
    if kind == "llama3" and numbers["low"] >= numbers["high"]:
        yield (f"model.rope_scaling llama3 goes from low up to high; got low={numbers['low']:g} and "
               f"high={numbers['high']:g}; exchange them")
    if kind == "dynamic" and turned <= 2:
        yield (f"model.rope_scaling dynamic needs more than one pair to turn; got {turned} entries of a head; use "
               "another kind")
    if len(model.latent) != 4 or min(model.latent) < 0:
        return
    if not (rank and size and 0 < turned < model.head_dim and turned % 2 == 0):
        yield ("latent attention has a rank of keys, a value size and an even turned part below model.head_dim; "
               f"got model.latent {model.latent} and head_dim {model.head_dim}")
    if model.kv_heads != model.heads:
        yield (f"latent attention has as many KV heads as heads; got {model.kv_heads} and {model.heads}; "
               f"set model.kv_heads={model.heads}")
    unfit = {"qkv": "qkv" in model.biases, "sinks": "sinks" in model.biases, "qk_norm": model.qk_norm != "none",
             "qkv_limit": model.qkv_limit is not None}
    if any(unfit.values()):
        yield f"latent attention has no {', '.join(filter(unfit.get, unfit))}; take out one or the other"


def check_moe(config: Config) -> Iterator[str]:
    moe = config.model.moe
    if "M" not in config.model.layer_kinds():
        return
    if moe.shared_gate and not moe.shared:
        yield "model.moe.shared_gate needs a shared expert; got model.moe.shared 0; set its width"
    if moe.router == "sparsemixer" and moe.active > 2:
        yield f"router sparsemixer chooses 1 or 2 experts; got model.moe.active {moe.active}; set it to 2"
    for part, whole in (("active", "experts"), ("active_groups", "expert_groups")):
        if (count := getattr(moe, part)) > (most := getattr(moe, whole)):
            yield f"model.moe.{part} must not exceed model.moe.{whole}; got {count} and {most}"
    if (groups := moe.expert_groups) > 0 and moe.active * groups > moe.active_groups * moe.experts:
        yield (f"the active groups must hold model.moe.active experts; {moe.active_groups} of {groups} groups hold "
               f"{moe.active_groups * moe.experts // groups}, active is {moe.active}; raise model.moe.active_groups")
    if moe.router == "expert_choice" and moe.capacity_factor is None:
        yield "router expert_choice fills experts to a capacity; model.moe.capacity_factor is none; set it to 1.0"
    if moe.router == "expert_choice" and groups != 1:
        yield f"router expert_choice knows no expert groups; model.moe.expert_groups is {groups}; set it to 1"


def check_vision(config: Config) -> Iterator[str]:
    """The encoder, how text looks at images, and what is trained of it; not where a text could not be read."""
    model, images = config.model, config.data.images
    told, look, crossed = model.encoder(), model.looks(), sorted(set(model.layer_letters()) & set(CROSSED))
    if not model.layers and not told:
        yield "model.layers must be above 0, but for an image encoder alone; got 0 and no model.vision"
    if told and told.width % told.heads:
        yield f"model.vision has heads that divide its width; got heads={told.heads} and width={told.width}"
    if told and told.patch > told.size:
        yield f"model.vision has patches within its size; got patch={told.patch} and size={told.size}"
    if crossed and not (told and look):
        yield f"layers {', '.join(crossed)} look at images; set model.vision and model.cross, as configs/vision.py does"
    if look and not crossed:
        yield f"model.cross is of layers V or W; model.pattern {model.pattern!r} has none; set it to VMM, say"
    if images and not (told and look and crossed):
        yield (f"data.images={images} needs a model that sees; set model.vision, model.cross and V or W in "
               "model.pattern, or data.images=0")
    if "text" in config.train.freeze and not images:
        yield "train.freeze=text leaves nothing to train without images; set data.images, or take it out"


def check_divisions(config: Config) -> Iterator[str]:
    """What must divide what."""
    model, moe, data, kinds = config.model, config.model.moe, config.data, config.model.layer_kinds()
    told, look = model.encoder(), model.looks()
    divided = [("model.heads", model.heads, "model.kv_heads mesh.tensor"), ("model.vocab", model.vocab, "mesh.tensor"),
               ("model.d_model", model.d_model, "mesh.fsdp"),
               ("data.sequence", data.sequence, "mesh.tensor" * config.mesh.sequence)]
    if "D" in kinds or (told and look):
        divided.append(("model.hidden", model.hidden, "mesh.tensor"))
    if "M" in kinds:
        divided += [("model.moe.hidden", moe.hidden, "mesh.tensor"), ("model.moe.shared", moe.shared, "mesh.tensor"),
                    ("model.moe.experts", moe.experts, "mesh.expert model.moe.expert_groups"),
                    ("data.sequence", data.sequence, "model.moe.group")]
    if told:
        divided += [(f"{name}= of model.vision", getattr(told, name), path) for name, path in (
            ("heads", "mesh.tensor"), ("width", "mesh.fsdp"), ("hidden", "mesh.tensor"))]
    if told and look and look.latents:
        divided += [("heads= of model.cross", look.heads, "mesh.tensor"),
                    ("4 × width= of model.vision", 4 * told.width, "mesh.tensor")]
    for name, size, paths in divided:
        for path in paths.split():
            length = attrgetter(path)(config) or 0  # none is no group
            if length > 0 and size % length:
                yield (f"{path} must divide {name}; got {length} and {size}; "
                       f"set {path} to one of {divisors(size)}, or {name}={up(size, length)}")


def check_mesh(config: Config) -> Iterator[str]:
    mesh, heads, batch, count = config.mesh, config.model.kv_heads, config.data.batch, config.train.microbatches
    if mesh.tensor > 0 and heads % mesh.tensor and mesh.tensor % heads:
        yield ("of mesh.tensor and model.kv_heads one must divide the other (KV heads are split or repeated); "
               f"got {mesh.tensor} and {heads}")
    shards = mesh.batch_shards() * count
    if shards > 0 and batch % shards:
        yield ("data.batch must be a multiple of mesh.data × mesh.fsdp × mesh.expert × train.microbatches; got "
               f"{batch} and {mesh.data} × {mesh.fsdp} × {mesh.expert} × {count} = {shards}; "
               f"set data.batch={up(batch, shards)}")
    devices, fake = mesh.devices(), mesh.fake_devices
    if min(devices, fake) > 0 and devices != fake:
        yield (f"the mesh axes must multiply to mesh.fake_devices; got {mesh.words()} = {devices} and {fake}; set "
               f"mesh.fake_devices={devices}")


def check_pipeline(config: Config) -> Iterator[str]:
    mesh, layers, count, split = config.mesh, config.model.layers, config.train.microbatches, config.mesh.stage_layers
    if mesh.schedule not in SCHEDULES and not mesh.schedule.endswith(".csv"):
        yield (f"mesh.schedule is one of {', '.join(SCHEDULES)}, or the path of a .csv table; got {mesh.schedule!r}"
               f"{nearest(mesh.schedule, SCHEDULES)}")
    if min(mesh.pipeline, mesh.chunks) < 1:
        return
    if mesh.parts() > max(layers, 1):
        yield (f"every part of a pipeline needs a layer; got mesh.pipeline {mesh.pipeline} × mesh.chunks "
               f"{mesh.chunks} = {mesh.parts()} and model.layers {layers}; "
               f"set mesh.pipeline={max(layers // mesh.chunks, 1)} or lower")
    if mesh.chunks > 1 and mesh.schedule in SCHEDULES and mesh.schedule != "interleaved":
        yield (f"only the schedule interleaved has several chunks; got {mesh.schedule} and mesh.chunks {mesh.chunks}; "
               "set mesh.schedule=interleaved or mesh.chunks=1")
    if mesh.schedule == "interleaved" and mesh.chunks > 1 and count % mesh.pipeline:
        yield ("the schedule interleaved takes microbatches in groups of mesh.pipeline; got train.microbatches "
               f"{count} and mesh.pipeline {mesh.pipeline}; set train.microbatches={up(count, mesh.pipeline)}")
    parts = mesh.parts()
    if split and (len(split) != parts or min(split) < 1 or sum(split) != layers):
        even = ",".join(str(layers // parts + (part < layers % parts)) for part in range(parts))
        none = [f"stage {part % mesh.pipeline}" for part, some in enumerate(split) if some < 1]
        yield (f"mesh.stage_layers gives each of mesh.pipeline × mesh.chunks = {parts} parts a layer or more, and all "
               f"{layers} of model.layers; got {' + '.join(map(str, split))} = {sum(split)}"
               f"{', nothing on ' * bool(none)}{', '.join(none)}; set it to {even}, say")


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.  Raises ConfigError on other text and on fields unknown to this version."""
    def flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, tuple(value) if isinstance(value, list) else value

    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"it is {found!r}")
    except ValueError as error:
        raise ConfigError([f"a config is a JSON object; this text is not ({error})"]) from None
    config, given, fields = Config(), dict(flat(found)), dict(leaves(Config()))
    refuse([unknown(path, fields) for path in given if path not in fields])
    for path, value in given.items():
        config = put(config, path.split("."), value)
    return checked(config)

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

BIASES = ("qkv", "output", "sinks", "mlp", "experts", "router", "norm", "head")  # `sinks` are of attention's softmax
ROPES = {  # the numbers that a rotary scaling needs, and those that it may have
    "": ((), ()), "linear": (("factor",), ()), "dynamic": (("factor", "original"), ()),
    "llama3": (("factor", "low", "high", "original"), ()),
    "yarn": (("factor", "original"), ("fast", "slow", "attention", "truncate"))}
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble")  # made in parallel/schedules.py
# Kinds of vision encoders and what they are where nothing else is said; None must be said.
SIZES = {"size": None, "patch": None, "width": None, "layers": None, "heads": None, "hidden": None}
ENCODERS = {
    "clip": SIZES | {"eps": 1e-5, "act": "quick_gelu", "fit": "crop", "pool": 0, "grid": 0,
                     "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
    "siglip": SIZES | {"eps": 1e-6, "act": "gelu", "fit": "squash", "pool": 0, "grid": 0,
                       "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}}
# Which images a token looks at, and how: `latents` of an image (0: all its patches) by a resampler of `depth` layers
# with `heads` of size `head`; `frames` of a video; `feed` is what passes the gated MLP; `gate` is a number or a vector;
# `norm` and `latent_norm` are of queries and keys.
CROSS = {"latents": 0, "depth": 2, "heads": 8, "head": 64, "frames": 1, "feed": "seen", "gate": "number",
         "norm": "none", "latent_norm": "none"}
LOOKS = {"last": CROSS, "all": CROSS}  # images of the same document before the token
WORDS = {"act": ("quick_gelu", "gelu", "gelu_exact", "relu"), "fit": ("crop", "squash"), "feed": ("seen", "every"),
         "gate": ("number", "vector"), "norm": ("none", "head"), "latent_norm": ("none", "head")}
SPELLINGS = {name: (" or ".join(words), str, words.__contains__) for name, words in WORDS.items()} | {
    name: ("a whole number", int, lambda x: x >= 0) for name in ("latents", "pool", "grid")} | {
    "layers": ("a whole number above 0", int, lambda x: x > 0),
    "eps": ("a number above 0", float, lambda x: 0 < x < math.inf),
    **{name: (rule, lambda text: tuple(map(float, text.split(","))), holds) for name, rule, holds in (
        ("mean", "three numbers", lambda x: len(x) == 3 and all(map(math.isfinite, x))),
        ("std", "three numbers above 0", lambda x: len(x) == 3 and all(0 < y < math.inf for y in x)))}}
EXAMPLES = {"vision": "clip size=224 patch=14 width=1024 layers=24 heads=16 hidden=4096",
            "cross": "last latents=64 depth=6 heads=16 head=96"}
FROZEN = ("text", "encoder")  # what train.freeze can name
CROSSED = {"V": "M", "W": "D", "v": "m", "w": "d"}  # letters of layers with cross-attention -> without


class ConfigError(ValueError):
    """Everything wrong with what the user asked for; `problems` holds one message per rule broken."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


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
    rope_scaling: str = ""  # "linear factor=2"; kinds and numbers stand in ROPES
    window: int | None = None  # tokens that a layer m or d looks at, itself included
    latent: tuple[int, ...] = ()  # latent attention: ranks of queries (0: none) and keys, turned part, value size
    qk_norm: Literal["none", "head", "all"] = "none"  # of queries and keys, each head for itself or all together
    qkv_limit: float | None = None  # queries, keys and values are clipped to it
    biases: tuple[str, ...] = ()  # of BIASES
    caps: tuple[float, ...] = ()  # soft caps of attention scores and of logits, 0 for none
    multipliers: tuple[float, ...] = ()  # of embeddings, of what layers add, of attention scores (0: usual), of logits
    vocab: int = 264
    tied: bool = False
    vision: str = ""  # the image encoder: "clip size=224 patch=14 width=1024 layers=24 heads=16 hidden=4096"; ENCODERS
    cross: str = ""  # how text looks at images: "last latents=64 depth=6 heads=16 head=96"; LOOKS
    moe: MoE = field(default_factory=MoE)

    def layer_letters(self) -> str:
        """One letter per layer: the pattern repeated to `layers` letters."""
        return (self.pattern * self.layers)[: self.layers]

    def layer_kinds(self) -> str:
        """M or D per layer."""
        return "".join(CROSSED.get(letter, letter) for letter in self.layer_letters()).upper()

    def encoder(self) -> SimpleNamespace | None:
        """What `vision` says, with `kind`; None without.  Raises ValueError on other text."""
        return spelled(self.vision, ENCODERS) if self.vision else None

    def looks(self) -> SimpleNamespace | None:
        """What `cross` says, with `kind`; None without.  Raises ValueError on other text."""
        return spelled(self.cross, LOOKS) if self.cross else None

    def rope(self) -> tuple[str, dict[str, float]]:
        """The kind of rotary scaling ("" for none) and its numbers.  Raises ValueError on other text."""
        kind, *parts = self.rope_scaling.split() or [""]
        numbers = {key: float(value) for key, value in (part.split("=") for part in parts)}
        if len(numbers) < len(parts):
            raise ValueError("a number is given twice")
        return kind, numbers


def spelled(text: str, kinds: dict[str, dict[str, Any]]) -> SimpleNamespace:
    """ "kind name=value …" with the other values of its kind.  Raises ValueError that says what is wrong."""
    kind, *parts = text.split() or [""]
    if kind not in kinds:
        raise ValueError(f"it begins with {' or '.join(kinds)}, not {kind!r}")
    values, given = dict(kinds[kind]), [part.partition("=")[::2] for part in parts]
    for name, value in given:
        if name not in values or [key for key, _ in given].count(name) > 1:
            raise ValueError(f"{kind} takes each of {', '.join(values)} once; got {name!r}")
        rule, read, holds = SPELLINGS.get(name, SPELLINGS["layers"])
        try:
            values[name] = read(value)
        except ValueError:
            values[name] = None
        if values[name] is None or not holds(values[name]):
            raise ValueError(f"{name} is {rule}, not {value!r}")
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ValueError(f"{kind} needs {', '.join(f'{name}=' for name in missing)}")
    return SimpleNamespace(kind=kind, **values)


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

    def devices(self) -> int:
        return self.data * self.fsdp * self.pipeline * self.expert * self.tensor

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
    freeze: tuple[str, ...] = ()  # what is not trained: text, encoder
    microbatches: int = 1
    seed: int = 0
    compute: Literal["bfloat16", "float32"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
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
    if path.suffix == ".json" and path.is_file():
        return load_json(path, overrides)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")] or [""], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near and near[0] else ""
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError([f"a config is a Python file; {path} {what}{hint}"])
    try:
        make = runpy.run_path(str(path)).get("config")
        config = make() if callable(make) else None
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise ConfigError([f"{path} does not run: {type(error).__name__}: {error}"]) from error
    if not callable(make):
        raise ConfigError([f"a config file defines config() -> Config; {path} does not"])
    if not isinstance(config, Config):
        raise ConfigError([f"config() returns a moejax Config; that of {path} returns {type(config).__name__}"])
    return finish(config, path.stem, overrides)


def load_json(path: Path, overrides: Sequence[str]) -> Config:
    """That of a run, for another run; unless run_dir is overridden, for the same."""
    try:
        return finish(from_json(path.read_text()), path.parent.name, overrides)
    except OSError as error:
        raise ConfigError([f"a config is a readable file; {path} is not ({error})"]) from None


def finish(config: Config, name: str, overrides: Sequence[str]) -> Config:
    config, problems = override(config, overrides)
    if not config.name:
        config = dataclasses.replace(config, name=name)
    if not config.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{config.name}")
    problems += check(config)
    if problems:
        raise ConfigError(problems)
    return config


def override(config: Config, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The config with "path.to.field=value" applied, and the problems of those that could not be."""
    problems, fields = [], dict(leaves(config))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            problems.append(f"an override is path.to.field=value; got {text!r}")
        elif inside := [name for name in fields if name.startswith(f"{path}.")]:
            problems.append(f"{path} is a group of fields; set one of {', '.join(inside)}")
        elif path not in fields:
            alike = [name for name in fields if name.split(".")[-1] == path.split(".")[-1]]
            near = difflib.get_close_matches(path, alike, 1, 0) or difflib.get_close_matches(path, fields, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(fields)}"
            problems.append(f"unknown field {path!r}{hint}")
        else:
            try:
                config = put(config, path.split("."), parse(value, fields[path][0]))
            except ValueError:
                problems.append(f"{path} takes {kind_name(fields[path][0])}; got {value!r}")
    return config, problems


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted path, (annotation, value)) of every field that is not itself a tree."""
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(hints[f.name]) and isinstance(value, hints[f.name]):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, (hints[f.name], value)


def put(node: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = put(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: value})


def parse(text: str, kind: Any) -> Any:
    """The value that `text` spells for an annotation.  Raises ValueError if it spells none."""
    if typing.get_origin(kind) is types.UnionType:
        options = typing.get_args(kind)
        if text.lower() in ("none", "null") and type(None) in options:
            return None
        return parse(text, next(option for option in options if option is not type(None)))
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            raise ValueError
        return text
    if typing.get_origin(kind) is tuple:
        return tuple(parse(part, typing.get_args(kind)[0]) for part in text.strip("[]()").split(",") if part)
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}[text.lower()] if text.lower() in (
            "true", "false", "1", "0") else parse("", int)
    return kind(text)


def kind_name(kind: Any) -> str:
    """An annotation in words, for messages."""
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(kind_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "values separated by commas"
    if dataclasses.is_dataclass(kind):
        return f"a moejax.config.{kind.__name__}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(kind, str(kind))


def fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is types.UnionType:
        return any(fits(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check(config: Config) -> list[str]:
    """Every rule that the config breaks: the rule, both values, the repair.  Empty when it is good."""
    wrong = [f"{path} takes {kind_name(kind)}; got {value!r}"
             for path, (kind, value) in leaves(config) if not fits(value, kind)]
    if wrong:  # the rules below compute with the values
        return wrong
    return check_ranges(config) + check_model(config) + check_mesh(config)


def check_ranges(config: Config) -> list[str]:
    positive = ("model.d_model model.heads model.kv_heads model.head_dim model.hidden model.norm_eps "
                "model.rope_theta model.window model.qkv_limit model.vocab model.moe.experts model.moe.active "
                "model.moe.hidden model.moe.group model.moe.capacity_factor model.moe.eval_capacity_factor "
                "mesh.data mesh.fsdp mesh.pipeline mesh.expert mesh.tensor mesh.chunks "
                "data.sequence data.batch data.rate optimizer.lr optimizer.eps train.steps train.microbatches "
                "train.eval_every train.eval_batches train.log_every checkpoint.every "
                "checkpoint.keep train.fault.loss_spike train.fault.norm_spike train.fault.limit train.fault.stall "
                "train.fault.heartbeat").split()
    shares = "data.validation optimizer.decay optimizer.final_lr optimizer.b1 optimizer.b2 model.moe.jitter".split()
    problems = []
    for path, (_, value) in leaves(config):
        if not isinstance(value, (int, float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{path} must be finite; got {value}")
        elif path in positive and value <= 0:
            problems.append(f"{path} must be above 0; got {value}" + "; set it to 1 or more" * isinstance(value, int))
        elif path in shares and not 0 <= value <= 1:
            problems.append(f"{path} must lie between 0 and 1; got {value}")
        elif path in ("optimizer.b1", "optimizer.b2") and value == 1:
            problems.append(f"{path} must be below 1, or nothing new is learned; got {value}")
        elif value < 0:
            problems.append(f"{path} must not be negative; got {value}")
        elif isinstance(value, int) and value >= 2**31:
            problems.append(f"{path} must be below 2**31, as it is counted in 32 bits; got {value}")
    return problems


def check_model(config: Config) -> list[str]:
    model, moe = config.model, config.model.moe
    problems = []

    def rule(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    def divides(small: int, large: int) -> bool:
        return small > 0 and large % small == 0

    rule(bool(model.pattern) and set(model.pattern.upper()) <= set("MDVW"),
         f"model.pattern is made of M (MoE layer) and D (dense layer), or V and W where they look at images, small "
         f"where attention has a window; got {model.pattern!r}")
    rule(model.window is not None or not set(model.layer_letters()) & set("mdvw"),
         f"small letters need model.window; got pattern {model.pattern!r} and no window; set it, or use capitals")
    rule(model.layers > 0 or bool(model.vision),
         f"model.layers must be above 0, but for an image encoder alone; got {model.layers} and no model.vision")
    rule(divides(model.kv_heads, model.heads),
         f"model.kv_heads must divide model.heads; got {model.kv_heads} and {model.heads}; "
         f"set model.kv_heads to one of {divisors(model.heads)}")
    rule(model.head_dim % 2 == 0, f"model.head_dim must be even for the rotary embedding; got {model.head_dim}")
    rule(config.data.tokenizer != "bytes" or model.vocab >= 257,
         f"model.vocab must hold the byte tokenizer's 257 tokens; got {model.vocab}; set model.vocab=264")
    problems += check_variants(model) + check_vision(config)
    if "M" not in model.layer_kinds():
        return problems
    rule(not moe.shared_gate or moe.shared > 0,
         f"model.moe.shared_gate needs a shared expert; got model.moe.shared {moe.shared}; set its width")
    rule(moe.router != "sparsemixer" or moe.active <= 2,
         f"router sparsemixer chooses 1 or 2 experts; got model.moe.active {moe.active}; set it to 2")
    rule(moe.active <= moe.experts,
         f"model.moe.active must not exceed model.moe.experts; got {moe.active} and {moe.experts}")
    rule(divides(moe.expert_groups, moe.experts),
         f"model.moe.expert_groups must divide model.moe.experts; got {moe.expert_groups} and {moe.experts}; "
         f"set model.moe.expert_groups to one of {divisors(moe.experts)}")
    rule(1 <= moe.active_groups <= moe.expert_groups,
         f"model.moe.active_groups must lie between 1 and model.moe.expert_groups; "
         f"got {moe.active_groups} and {moe.expert_groups}")
    rule(moe.active * moe.expert_groups <= moe.active_groups * moe.experts,
         f"the active groups must hold model.moe.active experts; {moe.active_groups} of {moe.expert_groups} groups "
         f"hold {moe.active_groups * moe.experts // max(moe.expert_groups, 1)}, active is {moe.active}; "
         "raise model.moe.active_groups")
    rule(moe.group is None or divides(moe.group, config.data.sequence),
         f"model.moe.group must divide data.sequence; got {moe.group} and {config.data.sequence}; "
         f"set model.moe.group to one of {divisors(config.data.sequence)}")
    rule(moe.router != "expert_choice" or moe.capacity_factor is not None,
         "router expert_choice fills every expert to its capacity; model.moe.capacity_factor is none; set it to 1.0")
    rule(moe.router != "expert_choice" or moe.expert_groups == 1,
         f"router expert_choice knows no expert groups; model.moe.expert_groups is {moe.expert_groups}; set it to 1")
    return problems


def check_variants(model: Model) -> list[str]:
    """The fields of a model that are texts or lists."""
    problems = []
    lengths = {"clamp": (2,), "latent": (0, 4), "caps": (0, 2), "multipliers": (0, 4)}
    problems += [f"model.{name} has {' or '.join(map(str, right))} numbers; got {getattr(model, name)}"
                 for name, right in lengths.items() if len(getattr(model, name)) not in right]
    problems += [f"model.{name} holds no negative number and none that is not finite; got {getattr(model, name)}"
                 for name in lengths if not all(0 <= x < math.inf for x in getattr(model, name))]
    if len(set(model.biases)) < len(model.biases):
        problems.append(f"model.biases names each part once; got {', '.join(model.biases)}")
    if 0 < model.rope_theta <= 1:
        problems.append(f"model.rope_theta must be above 1; got {model.rope_theta}; set it to 10000")
    unknown = sorted(set(model.biases) - set(BIASES))
    if unknown:
        problems.append(f"model.biases names some of {', '.join(BIASES)}; got {', '.join(map(repr, unknown))}")
    if not problems and model.latent:
        _, rank, turned, size = model.latent
        if not (rank > 0 and size > 0 and 0 < turned < model.head_dim and turned % 2 == 0):
            problems.append("latent attention has a rank of keys, a value size and an even turned part below "
                            f"model.head_dim; got model.latent {model.latent} and head_dim {model.head_dim}")
        if model.kv_heads != model.heads:
            problems.append(f"latent attention has as many KV heads as heads; got {model.kv_heads} and {model.heads}; "
                            f"set model.kv_heads={model.heads}")
        unfit = sorted({"qkv", "sinks"} & set(model.biases)) + ["qk_norm"] * (model.qk_norm != "none") + [
            "qkv_limit"] * (model.qkv_limit is not None)
        if unfit:
            problems.append(f"latent attention has no {', '.join(unfit)}; take out one or the other")
    try:
        kind, numbers = model.rope()
        needed, allowed = ROPES[kind]
        wrong = (set(needed) - set(numbers)) | (set(numbers) - set(needed) - set(allowed))
        if wrong or not all(0 < x < math.inf for name, x in numbers.items() if name != "truncate"):
            raise ValueError
        if kind == "llama3" and numbers["low"] >= numbers["high"]:
            problems.append(f"model.rope_scaling llama3 goes from low up to high; got low={numbers['low']:g} and "
                            f"high={numbers['high']:g}; exchange them")
        turned = model.latent[2] if len(model.latent) == 4 else model.head_dim
        if kind == "dynamic" and turned <= 2:
            problems.append(f"model.rope_scaling dynamic needs more than one pair to turn; got {turned} entries of a "
                            "head; use another kind")
    except (ValueError, KeyError):
        kinds = "; ".join(f"{kind} {' '.join(f'{name}=' for name in needed)}" for kind, (needed, _) in ROPES.items()
                          if kind)
        problems.append(f"model.rope_scaling is empty or a kind with its numbers, above 0 ({kinds}); "
                        f"got {model.rope_scaling!r}")
    return problems


def check_vision(config: Config) -> list[str]:
    """The encoder, how text looks at images, and what is trained of it."""
    model, problems = config.model, []
    for name, read in (("vision", model.encoder), ("cross", model.looks)):
        try:
            read()
        except ValueError as error:
            problems.append(f'model.{name} is text such as {EXAMPLES[name]!r}; in {getattr(model, name)!r} {error}')
    problems += [f"train.freeze names some of {', '.join(FROZEN)}; got {name!r}" for name in config.train.freeze
                 if name not in FROZEN]
    if problems:
        return problems
    told, rules, looking = model.encoder(), model.looks(), set(model.layer_letters()) & set(CROSSED)
    if told and told.width % told.heads:
        problems.append(f"model.vision has heads that divide its width; got heads={told.heads} and width={told.width}")
    if told and told.patch > told.size:
        problems.append(f"model.vision has patches within its size; got patch={told.patch} and size={told.size}")
    if looking and not (told and rules):
        problems.append(f"layers {', '.join(sorted(looking))} look at images; set model.vision and model.cross, as in "
                        f"{EXAMPLES['vision']!r} and {EXAMPLES['cross']!r}")
    if rules and not looking:
        problems.append(f"model.cross is of layers V or W; model.pattern {model.pattern!r} has none; set it to "
                        f"{next(letter for letter, other in CROSSED.items() if other in 'MD')}MM, say")
    if config.data.images and not (told and rules and looking):
        problems.append(f"data.images={config.data.images} needs a model that sees; set model.vision, model.cross and "
                        "V or W in model.pattern, or data.images=0")
    if "text" in config.train.freeze and not config.data.images:
        problems.append("train.freeze=text leaves nothing to train without images; set data.images, or take it out")
    return problems


def check_mesh(config: Config) -> list[str]:
    model, moe, mesh, data = config.model, config.model.moe, config.mesh, config.data
    kinds = model.layer_kinds()
    divided = [("model.heads", model.heads, "tensor"), ("model.vocab", model.vocab, "tensor"),
               ("model.d_model", model.d_model, "fsdp")]
    if "D" in kinds:
        divided.append(("model.hidden", model.hidden, "tensor"))
    if "M" in kinds:
        divided += [("model.moe.hidden", moe.hidden, "tensor"), ("model.moe.shared", moe.shared, "tensor"),
                    ("model.moe.experts", moe.experts, "expert")]
    try:
        told, rules = model.encoder(), model.looks()
    except ValueError:  # told elsewhere
        told = rules = None
    if told:
        divided += [("heads= of model.vision", told.heads, "tensor"), ("width= of model.vision", told.width, "fsdp"),
                    ("hidden= of model.vision", told.hidden, "tensor")]
    if told and rules:
        divided += [("model.hidden", model.hidden, "tensor")] * ("D" not in kinds)
        divided += [("heads= of model.cross", rules.heads, "tensor"),
                    ("4 × width= of model.vision", 4 * told.width, "tensor")] * bool(rules.latents)
    if mesh.sequence:
        divided.append(("data.sequence", data.sequence, "tensor"))
    problems = []
    for name, size, axis in divided:
        length = getattr(mesh, axis)
        if length > 0 and size % length:
            problems.append(f"mesh.{axis} must divide {name}; got {length} and {size}; "
                            f"set mesh.{axis} to one of {divisors(size)}, or {name}={up(size, length)}")
    if mesh.tensor > 0 and model.kv_heads % mesh.tensor and mesh.tensor % model.kv_heads:
        problems.append("of mesh.tensor and model.kv_heads one must divide the other (KV heads are split or repeated); "
                        f"got {mesh.tensor} and {model.kv_heads}")
    shards = mesh.batch_shards() * config.train.microbatches
    if shards > 0 and data.batch % shards:
        problems.append(
            "data.batch must be a multiple of mesh.data × mesh.fsdp × mesh.expert × train.microbatches; "
            f"got {data.batch} and {mesh.data} × {mesh.fsdp} × {mesh.expert} × {config.train.microbatches} = {shards}; "
            f"set data.batch={up(data.batch, shards)}")
    if min(mesh.fake_devices, mesh.devices()) > 0 and mesh.fake_devices != mesh.devices():
        problems.append(
            "the mesh axes must multiply to mesh.fake_devices; "
            f"got {' × '.join(f'{a} {getattr(mesh, a)}' for a in ('data', 'fsdp', 'pipeline', 'expert', 'tensor'))} "
            f"= {mesh.devices()} and {mesh.fake_devices}; set mesh.fake_devices={mesh.devices()}")
    return problems + check_pipeline(config)


def check_pipeline(config: Config) -> list[str]:
    mesh, layers, count = config.mesh, config.model.layers, config.train.microbatches
    problems = []
    if mesh.schedule not in SCHEDULES and not mesh.schedule.endswith(".csv"):
        near = difflib.get_close_matches(mesh.schedule, SCHEDULES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"mesh.schedule is one of {', '.join(SCHEDULES)}, or the path of a .csv table; "
                        f"got {mesh.schedule!r}{hint}")
    if min(mesh.pipeline, mesh.chunks) < 1:
        return problems
    if mesh.parts() > max(layers, 1):
        problems.append(f"every part of a pipeline needs a layer; got mesh.pipeline {mesh.pipeline} × mesh.chunks "
                        f"{mesh.chunks} = {mesh.parts()} and model.layers {layers}; "
                        f"set mesh.pipeline={max(layers // mesh.chunks, 1)} or lower")
    if mesh.chunks > 1 and mesh.schedule in SCHEDULES and mesh.schedule != "interleaved":
        problems.append(f"only the schedule interleaved has several chunks; got {mesh.schedule} and mesh.chunks "
                        f"{mesh.chunks}; set mesh.schedule=interleaved or mesh.chunks=1")
    if mesh.schedule == "interleaved" and mesh.chunks > 1 and count % mesh.pipeline:
        problems.append(f"the schedule interleaved takes microbatches in groups of mesh.pipeline; got "
                        f"train.microbatches {count} and mesh.pipeline {mesh.pipeline}; "
                        f"set train.microbatches={up(count, mesh.pipeline)}")
    if mesh.stage_layers:
        if len(mesh.stage_layers) != mesh.parts():
            problems.append(f"mesh.stage_layers has an entry for each of the mesh.pipeline × mesh.chunks parts; got "
                            f"{len(mesh.stage_layers)} and {mesh.parts()}")
        problems += [f"every stage needs a layer; mesh.stage_layers gives stage {part % mesh.pipeline} (part {part}) "
                     f"{some}; set it to 1 or more" for part, some in enumerate(mesh.stage_layers) if some < 1]
        if sum(mesh.stage_layers) != layers:
            last = layers - sum(mesh.stage_layers[:-1])
            repair = f"; give stage {(mesh.parts() - 1) % mesh.pipeline} {last}" if last > 0 else ""
            sum_ = f"{' + '.join(map(str, mesh.stage_layers))} = {sum(mesh.stage_layers)}"
            problems.append(f"mesh.stage_layers must add up to model.layers; got {sum_} and {layers}{repair}")
    return problems


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.  Raises ConfigError on other text and on fields unknown to this version."""
    problems: list[str] = []

    def build(cls: type, values: Any, prefix: str) -> Any:
        hints, known = typing.get_type_hints(cls), {}
        if not isinstance(values, dict):
            problems.append(f"{prefix.rstrip('.') or 'a config'} is a JSON object; got {values!r}")
            return cls()
        for key, value in values.items():
            if key not in hints:
                near = difflib.get_close_matches(key, hints, 1)
                hint = f"; did you mean {prefix + near[0]}?" if near else ""
                problems.append(f"unknown field {prefix + key!r}{hint}")
            elif dataclasses.is_dataclass(hints[key]):
                known[key] = build(hints[key], value, f"{prefix}{key}.")
            else:
                known[key] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

    try:
        config = build(Config, json.loads(text), "")
    except json.JSONDecodeError as error:
        raise ConfigError([f"a config is a JSON object; this text is not ({error})"]) from None
    problems += [] if problems else check(config)
    if problems:
        raise ConfigError(problems)
    return config

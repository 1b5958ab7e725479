"""Published configs: what their keys may hold, and how each family's become fields of our model.

What our model cannot do is collected as problems, to be told at once.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import MoE
from moejax.model.rotary import yarn_factor

SLIDES, FULL = "sliding_attention", "full_attention"  # of a layer, in layer_types
LAYERS = 10_000  # at most; a number beyond it is a mistake, and would be counted out layer by layer
KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number, 1 or more": lambda x: type(x) is int and 0 < x < 2**31,
    "a whole number": lambda x: type(x) is int and 0 <= x < 2**31,
    "a number": lambda x: type(x) in (int, float) and math.isfinite(x),
    "a number above 0": lambda x: type(x) in (int, float) and 0 < x < math.inf,
    "true or false": lambda x: type(x) is bool, "text": lambda x: type(x) is str,
    "a list of texts": lambda x: type(x) is list and all(type(each) is str for each in x),
    "a list of numbers": lambda x: type(x) is list and all(type(each) is int for each in x),
    "a JSON object": lambda x: isinstance(x, dict),
    f"a whole number, from 1 to {LAYERS}": lambda x: type(x) is int and 0 < x <= LAYERS}
KEYS = {key: kind for kind, keys in zip(KINDS, (
    "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings original_max_position_embeddings num_local_experts num_experts n_routed_experts "
    "num_experts_per_tok moe_intermediate_size decoder_sparse_step n_group topk_group kv_lora_rank qk_rope_head_dim "
    "v_head_dim image_size patch_size num_channels embed_dim cross_layer_interval resampler_n_latents resampler_depth "
    "resampler_n_heads resampler_head_dim",
    "shared_expert_intermediate_size n_shared_experts first_k_dense_replace max_window_layers q_lora_rank "
    "sliding_window qk_nope_head_dim num_nextn_predict_layers additional_vocab_size",
    "router_aux_loss_coef router_jitter_noise input_jitter_noise embedding_multiplier residual_multiplier "
    "attention_multiplier routed_scaling_factor swiglu_alpha mscale mscale_all_dim attention_factor",
    "rms_norm_eps rope_theta clip_qkv swiglu_limit logits_scaling factor low_freq_factor high_freq_factor beta_fast "
    "beta_slow partial_rotary_factor layer_norm_eps",
    "tie_word_embeddings attention_bias mlp_bias qkv_bias lm_head_bias norm_topk_prob use_sliding_window truncate "
    "rope_interleave vision_use_head use_resampler qk_layer_norms qk_layer_norms_perceiver",
    "hidden_act rope_type type topk_method scoring_func alpha_type", "layer_types", "mlp_only_layers",
    "rope_parameters rope_scaling vision_config perceiver_config",
    "num_hidden_layers"), strict=True) for key in keys.split()}


class Reader:
    """A published config; remembers what was asked of it, and what our model cannot do.  `inside` is part of it."""

    def __init__(self, values: Mapping[str, Any], inside: str = "", problems: list[str] | None = None):
        self.values, self.asked, self.inside = values, set(), inside
        self.problems = [] if problems is None else problems

    def __call__(self, key: str, default: Any = None) -> Any:
        """A value of the wrong kind is a problem, and the default."""
        self.asked.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not KINDS[KEYS[key]](value):
            self.problem(f"config.json must hold {KEYS[key]}, as {self.inside}{key}; it has {value!r}")
            return default
        return value

    def problem(self, text: str) -> None:
        """As a key may be asked for twice, each is told once."""
        if text not in self.problems:
            self.problems.append(text)

    def require(self, key: str) -> Any:
        value = self(key)
        if self.values.get(key) is None:
            self.problem(f"config.json must hold {self.inside}{key}; it does not")
        return 1 if value is None else value

    def only(self, key: str, *right: Any) -> None:
        """The first value is the default."""
        value = self(key, right[0])
        if value not in right:
            self.problem(f"{key} can be {' or '.join(map(repr, right))} here; config.json has {value!r}")


ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ENCODER_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu_exact", "gelu_pytorch_tanh": "gelu",
                       "gelu_new": "gelu", "relu": "relu"}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
IDEFICS_VISION = CLIP | {"intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
                         "patch_size": 14, "hidden_act": "gelu"}


def rope(read: Reader) -> tuple[float, str]:
    """Theta and our text of the scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    found, theta = rope_reader(read), read("rope_theta", 10_000.0)
    if any(isinstance(value, dict) for value in found.values.values()):
        read.problems.append(f"rope_parameters are the same for all layers here; config.json has {found.values}")
        return theta, ""
    if (part := found("partial_rotary_factor", read("partial_rotary_factor", 1.0))) != 1.0:
        read.problems.append(f"rotary positions turn whole heads here; config.json has partial_rotary_factor {part}")
    longest = read("max_position_embeddings", 2048)
    original = found("original_max_position_embeddings", read("original_max_position_embeddings", longest))
    kind, numbers = found("rope_type", found("type", "default")), {}
    if kind == "linear":
        numbers = {"factor": found.require("factor")}
    elif kind == "dynamic":
        numbers = {"factor": found.require("factor"), "original": longest}
    elif kind == "llama3":
        numbers = {"factor": found.require("factor"), "low": found.require("low_freq_factor"),
                   "high": found.require("high_freq_factor"), "original": original}
    elif kind == "yarn":
        numbers = {"factor": found("factor", longest / original), "original": original,
                   "fast": found("beta_fast", 32), "slow": found("beta_slow", 1),
                   "truncate": int(found("truncate", True))}
        numbers["attention"] = sharpening(found, numbers["factor"])
    elif kind != "default":
        read.problems.append(f"a rotary scaling is linear, dynamic, llama3 or yarn here; config.json has {kind!r}")
    text = " ".join([kind if numbers else "", *(f"{name}={number!r}" for name, number in numbers.items())])
    return float(found("rope_theta", theta)), text


def rope_reader(read: Reader) -> Reader:
    name = "rope_parameters" if read("rope_parameters") else "rope_scaling"
    return Reader(read(name) or {}, f"{name}.", read.problems)


def sharpening(found: Reader, factor: float) -> float:
    """What YaRN multiplies sine and cosine by."""
    if found("attention_factor") is not None:
        return found("attention_factor")
    if found("mscale") and found("mscale_all_dim"):
        return yarn_factor(factor, found("mscale")) / yarn_factor(factor, found("mscale_all_dim"))
    return yarn_factor(factor)


def letters(read: Reader, experts: Callable[[int], bool], windowed: Callable[[int], bool]) -> dict[str, Any]:
    """Pattern and window, from which layers have experts and whose attention slides."""
    kinds, window, count = read("layer_types"), read("sliding_window"), read.require("num_hidden_layers")
    if kinds is not None and (len(kinds) != count or set(kinds) - {SLIDES, FULL}):
        read.problems.append(f"layer_types has {SLIDES} or {FULL} for every layer; config.json has {kinds}")
        kinds = None
    slides = [bool(window) and (windowed(i) if kinds is None else kinds[i] == SLIDES) for i in range(count)]
    text = "".join("Mm"[slides[i]] if experts(i) else "Dd"[slides[i]] for i in range(count))
    return {"pattern": shortest(text), "window": window if text != text.upper() else None}


def shortest(text: str) -> str:
    """The shortest pattern that, repeated, gives the text."""
    return next(text[:n] for n in range(1, len(text) + 1) if (text[:n] * len(text))[:len(text)] == text)


def moe(read: Reader, **fields: Any) -> MoE:
    """Dropless, as published models run."""
    return MoE(**{"active": read("num_experts_per_tok", 2), "hidden": read.require("intermediate_size"),
                  "balance_loss": float(read("router_aux_loss_coef", 0.0)), "z_loss": 0.0, "capacity_factor": None,
                  "dispatcher": "blocked"} | fields)


def biases(read: Reader, attention: bool = False, **parts: bool) -> tuple[str, ...]:
    """Of attention where config.json says so, or else by `attention`, and of these parts."""
    attention = read("attention_bias", attention)
    return tuple(name for name, there in {"qkv": attention, "output": attention, **parts}.items() if there)


def llama(read: Reader) -> dict[str, Any]:
    return {"biases": biases(read, mlp=read("mlp_bias", False))}


def mistral(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: False, lambda i: True)


def mixtral(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: True) | {"moe": moe(
        read, experts=read("num_local_experts", 8), jitter=float(read("router_jitter_noise", 0.0)))}


def qwen_layers(read: Reader, windowed: Callable[[int], bool]) -> dict[str, Any]:
    dense, step = read("mlp_only_layers", []), read("decoder_sparse_step", 1)
    found = letters(read, lambda i: i not in dense and (i + 1) % step == 0, windowed)
    if not read("use_sliding_window", False):
        found = {"pattern": found["pattern"].upper(), "window": None}
    return found


def qwen2_moe(read: Reader) -> dict[str, Any]:
    first = read("max_window_layers", 28)
    return qwen_layers(read, lambda i: i % 2 == 0 and i < first) | {"biases": ("qkv",) * read("qkv_bias", True),
        "moe": moe(read, experts=read("num_experts", 60), active=read("num_experts_per_tok", 4),
                   hidden=read("moe_intermediate_size", 1408), shared=read("shared_expert_intermediate_size", 5632),
                   shared_gate=True, renormalise=read("norm_topk_prob", False))}


def qwen3_moe(read: Reader) -> dict[str, Any]:
    return qwen_layers(read, lambda i: True) | {"qk_norm": "head", "biases": biases(read),
        "moe": moe(read, experts=read("num_experts", read("num_local_experts", 128)),
                   active=read("num_experts_per_tok", 8), hidden=read("moe_intermediate_size", 768),
                   renormalise=read("norm_topk_prob", False))}


def olmoe(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: False) | {
        "qk_norm": "all", "biases": biases(read), "qkv_limit": read("clip_qkv"),
        "moe": moe(read, experts=read("num_experts", 64), active=read("num_experts_per_tok", 8),
                   renormalise=read("norm_topk_prob", False))}


def phimoe(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: True) | {
        "norm": "layernorm", "biases": biases(read, norm=True, head=read("lm_head_bias", False)),
        "moe": moe(read, experts=read("num_local_experts", 16), router="sparsemixer",
                   mixer_gap=float(read("router_jitter_noise", 0.01)), jitter=float(read("input_jitter_noise", 0.0)))}


def granitemoe(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: False) | {
        "biases": biases(read), "moe": moe(read, experts=read("num_local_experts", 8), softmax="after"),
        "multipliers": (float(read("embedding_multiplier", 1.0)), float(read("residual_multiplier", 1.0)),
                        float(read("attention_multiplier", 1.0)), 1 / float(read("logits_scaling", 1.0)))}


def gpt_oss(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: i % 2 == 0) | {
        "activation": "clamped_swiglu", "clamp": (float(read("swiglu_alpha", 1.702)), float(read("swiglu_limit", 7.0))),
        "biases": biases(read, True, sinks=True, experts=True, router=True),
        "moe": moe(read, experts=read("num_local_experts", read("num_experts", 128)),
                   active=read("num_experts_per_tok", 4), softmax="after")}


ONE_WIDTH = (mixtral, olmoe, phimoe, granitemoe, gpt_oss)  # whose experts are as wide as `intermediate_size` says


def deepseek_v3(read: Reader) -> dict[str, Any]:
    first, heads = read("first_k_dense_replace", 3), read.require("num_attention_heads")
    still, turned = read("qk_nope_head_dim", 128), read("qk_rope_head_dim", 64)
    if read("num_key_value_heads", heads) != heads:
        read.problems.append("latent attention has as many KV heads as heads; config.json has num_key_value_heads "
                             f"{read('num_key_value_heads')} and num_attention_heads {heads}")
    if "topk_method" in read.values:
        read.only("topk_method", "noaux_tc")
        read.only("scoring_func", "sigmoid")
    found, scale = rope_reader(read), 0.0
    if found("rope_type", found("type", "default")) != "default" and found("mscale_all_dim"):
        scale = (still + turned) ** -0.5 * yarn_factor(found.require("factor"), found("mscale_all_dim")) ** 2
    hidden = read("moe_intermediate_size", 2048)
    return letters(read, lambda i: i >= first, lambda i: False) | {
        "kv_heads": heads, "head_dim": still + turned, "multipliers": (1.0, 1.0, scale, 1.0) if scale else (),
        "latent": (read("q_lora_rank", 0) if "q_lora_rank" in read.values else 1536, read("kv_lora_rank", 512), turned,
                   read("v_head_dim", 128)), "biases": ("output",) * read("attention_bias", False),
        "moe": moe(read, experts=read("n_routed_experts", read("num_local_experts", 256)),
                   active=read("num_experts_per_tok", 8), hidden=hidden, shared=hidden * read("n_shared_experts", 1),
                   router="sigmoid", renormalise=read("norm_topk_prob", True), expert_groups=read("n_group", 8),
                   active_groups=read("topk_group", 4), scale=float(read("routed_scaling_factor", 2.5)))}


def encoder(read: Reader, kind: str, more: str = "") -> str:
    """Our text of an image encoder."""
    act, names = read.require("hidden_act"), {
        "size": "image_size", "patch": "patch_size", "width": "hidden_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "hidden": "intermediate_size", "eps": "layer_norm_eps"}
    if act not in ENCODER_ACTIVATIONS:
        read.problem(f"{read.inside}hidden_act can be {', '.join(ENCODER_ACTIVATIONS)} here; config.json has {act!r}")
    read.only("num_channels", 3)
    return " ".join([kind, *(f"{name}={read.require(key)!r}" for name, key in names.items()),
                     f"act={ENCODER_ACTIVATIONS.get(act, 'gelu')}{more}"])


def clip(read: Reader) -> dict[str, Any]:
    return {"vision": encoder(read, "clip")}


def siglip(read: Reader) -> dict[str, Any]:
    return {"vision": encoder(read, "siglip", f" pool={int(read('vision_use_head', True))}")}


def idefics(read: Reader) -> dict[str, Any]:
    """Flamingo's successor: the images that its processor lets a token see are the last before it."""
    every, count, heads = read("cross_layer_interval", 1), read("num_hidden_layers", 1), read("num_attention_heads", 1)
    width, norms = read("hidden_size", 1), {True: "head", False: "none"}
    if count % every:
        read.problem(f"cross_layer_interval must divide num_hidden_layers here; config.json has {every} and {count}")
    if width % heads:
        read.problem(f"num_attention_heads must divide hidden_size; config.json has {heads} and {width}")
    read.only("alpha_type", "float", "vector")
    found = read("vision_config") or {}
    wide = {"hidden_size": found["embed_dim"]} if "embed_dim" in found else {}
    seen = Reader(IDEFICS_VISION | found | wide, "vision_config.", read.problems)
    inner = Reader(read("perceiver_config") or {}, "perceiver_config.", read.problems)
    look = (f"last feed=every gate={'vector' if read('alpha_type') == 'vector' else 'number'} "
            f"norm={norms[read('qk_layer_norms', False)]}")
    if read("use_resampler", False):
        look += (f" latents={inner('resampler_n_latents', 64)} depth={inner('resampler_depth', 6)} "
                 f"heads={inner('resampler_n_heads', 16)} head={inner('resampler_head_dim', 96)} "
                 f"latent_norm={norms[inner('qk_layer_norms_perceiver', False)]}")
    return {"pattern": shortest(("W" + "D" * (every - 1)) * max(count // every, 1)), "kv_heads": heads,
            "head_dim": width // heads, "vocab": read.require("vocab_size") + read("additional_vocab_size", 0),
            "vision": encoder(seen, "clip", " fit=squash"), "cross": look}

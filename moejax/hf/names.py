"""Families of published checkpoints: a table from their tensors to our weights, and how their config reads.

An `Entry` names the dimensions of a tensor by the axes of our weight (model/weights.py), so that the permutation
follows from the two; several axes in brackets share a dimension.  The model never asks for a family's name: what a
family needs is a value in the config.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from moejax.config import Model, MoE
from moejax.model.rotary import yarn_factor


class Entry(NamedTuple):
    """One kind of tensor.

    `there` has {layer} and {expert} for numbers; `here` ends the name of our weight, in a layer or of the model; an
    axis marked ~ ends in entries that rotary positions turn in neighbouring pairs, where ours turn halves.
    """

    there: str
    here: str
    axes: str
    gate: int | None = None  # the tensor is this one of the matrices into the hidden layer


LAYER = "model.layers.{layer}."
OUTSIDE = (
    Entry("model.embed_tokens.weight", "embedding", "vocab embed"),
    Entry("model.norm.weight", "norm.scale", "norm"),
    Entry("model.norm.bias", "norm.bias", "norm"),
    Entry("lm_head.weight", "head", "vocab embed"),
    Entry("lm_head.bias", "head_bias", "vocab"),
    Entry(LAYER + "input_layernorm.weight", "attention_norm.scale", "norm"),
    Entry(LAYER + "input_layernorm.bias", "attention_norm.bias", "norm"),
    Entry(LAYER + "post_attention_layernorm.weight", "feed_norm.scale", "norm"),
    Entry(LAYER + "post_attention_layernorm.bias", "feed_norm.bias", "norm"),
)
ATTENTION = (
    Entry(LAYER + "self_attn.q_proj.weight", "attention.q", "(heads head) embed"),
    Entry(LAYER + "self_attn.q_proj.bias", "attention.q_bias", "(heads head)"),
    Entry(LAYER + "self_attn.k_proj.weight", "attention.k", "(kv head) embed"),
    Entry(LAYER + "self_attn.k_proj.bias", "attention.k_bias", "(kv head)"),
    Entry(LAYER + "self_attn.v_proj.weight", "attention.v", "(kv head) embed"),
    Entry(LAYER + "self_attn.v_proj.bias", "attention.v_bias", "(kv head)"),
    Entry(LAYER + "self_attn.o_proj.weight", "attention.o", "embed (heads head)"),
    Entry(LAYER + "self_attn.o_proj.bias", "attention.o_bias", "norm"),
    Entry(LAYER + "self_attn.sinks", "attention.sinks", "heads"),
)
HEAD_NORMS = (
    Entry(LAYER + "self_attn.q_norm.weight", "attention.q_norm", "head"),
    Entry(LAYER + "self_attn.k_norm.weight", "attention.k_norm", "head"),
)
WHOLE_NORMS = (
    Entry(LAYER + "self_attn.q_norm.weight", "attention.q_norm", "(heads head)"),
    Entry(LAYER + "self_attn.k_norm.weight", "attention.k_norm", "(kv head)"),
)


LATENT = (
    Entry(LAYER + "self_attn.q_proj.weight", "attention.q", "(heads head~) embed"),
    Entry(LAYER + "self_attn.q_a_proj.weight", "attention.q_down", "queries embed"),
    Entry(LAYER + "self_attn.q_a_proj.bias", "attention.q_down_bias", "queries"),
    Entry(LAYER + "self_attn.q_a_layernorm.weight", "attention.q_norm", "queries"),
    Entry(LAYER + "self_attn.q_b_proj.weight", "attention.q", "(heads head~) queries"),
    Entry(LAYER + "self_attn.kv_a_proj_with_mqa.weight", "attention.kv_down", "mixed~ embed"),
    Entry(LAYER + "self_attn.kv_a_proj_with_mqa.bias", "attention.kv_down_bias", "mixed~"),
    Entry(LAYER + "self_attn.kv_a_layernorm.weight", "attention.kv_norm", "keys"),
    Entry(LAYER + "self_attn.kv_b_proj.weight", "attention.kv", "(heads both) keys"),
    Entry(LAYER + "self_attn.o_proj.weight", "attention.o", "embed (heads head)"),
    Entry(LAYER + "self_attn.o_proj.bias", "attention.o_bias", "norm"),
)


def mlp(
    there: str, here: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Entry, ...]:
    """The three matrices of a gated MLP, or of every expert."""
    gate, up, down = names
    return (
        Entry(f"{LAYER}{there}{gate}.weight", f"{here}up", "hidden embed", 0),
        Entry(f"{LAYER}{there}{gate}.bias", f"{here}up_bias", "hidden", 0),
        Entry(f"{LAYER}{there}{up}.weight", f"{here}up", "hidden embed", 1),
        Entry(f"{LAYER}{there}{up}.bias", f"{here}up_bias", "hidden", 1),
        Entry(f"{LAYER}{there}{down}.weight", f"{here}down", "embed hidden"),
        Entry(f"{LAYER}{there}{down}.bias", f"{here}down_bias", "norm"),
    )


DENSE = mlp("mlp.", "feed.mlp.")
MIXTRAL_EXPERTS = (*mlp("block_sparse_moe.experts.{expert}.", "feed.", ("w1", "w3", "w2")),
                   Entry(LAYER + "block_sparse_moe.gate.weight", "feed.router", "choice embed"))
QWEN_EXPERTS = (*mlp("mlp.experts.{expert}.", "feed."), Entry(LAYER + "mlp.gate.weight", "feed.router", "choice embed"))


LAYERS = 10_000  # at most; a number beyond it is a mistake, and would be counted out layer by layer
KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number, 1 or more": lambda x: type(x) is int and 0 < x < 2**31,
    "a whole number": lambda x: type(x) is int and 0 <= x < 2**31,
    "a number": lambda x: type(x) in (int, float) and math.isfinite(x),
    "a number above 0": lambda x: type(x) in (int, float) and 0 < x < math.inf,
    "true or false": lambda x: type(x) is bool,
    "text": lambda x: type(x) is str,
    "a list of texts": lambda x: type(x) is list and all(type(each) is str for each in x),
    "a list of numbers": lambda x: type(x) is list and all(type(each) is int for each in x),
    "a JSON object": lambda x: isinstance(x, dict),
    f"a whole number, from 1 to {LAYERS}": lambda x: type(x) is int and 0 < x <= LAYERS}
KEYS = {key: kind for kind, keys in zip(KINDS, (
    "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings original_max_position_embeddings num_local_experts num_experts n_routed_experts "
    "num_experts_per_tok moe_intermediate_size decoder_sparse_step n_group topk_group kv_lora_rank qk_rope_head_dim "
    "v_head_dim",
    "shared_expert_intermediate_size n_shared_experts first_k_dense_replace max_window_layers q_lora_rank "
    "sliding_window qk_nope_head_dim num_nextn_predict_layers",
    "router_aux_loss_coef router_jitter_noise input_jitter_noise embedding_multiplier residual_multiplier "
    "attention_multiplier routed_scaling_factor swiglu_alpha mscale mscale_all_dim attention_factor",
    "rms_norm_eps rope_theta clip_qkv swiglu_limit logits_scaling factor low_freq_factor high_freq_factor beta_fast "
    "beta_slow partial_rotary_factor",
    "tie_word_embeddings attention_bias mlp_bias qkv_bias lm_head_bias norm_topk_prob use_sliding_window truncate "
    "rope_interleave",
    "hidden_act rope_type type topk_method scoring_func", "layer_types", "mlp_only_layers",
    "rope_parameters rope_scaling", "num_hidden_layers"), strict=True) for key in keys.split()}


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


@dataclass(frozen=True)
class Family:
    """`read` gives the fields of Model that differ from the common ones."""

    architecture: str
    entries: tuple[Entry, ...]
    read: Callable[[Reader], dict[str, Any]]
    silent: Mapping[str, Any] = field(default_factory=dict)  # what it means that a config lacks a key, where not null

    def reader(self, published: Mapping[str, Any]) -> "Reader":
        return Reader({**self.silent, **published})


ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def model_of(family: Family, read: Reader) -> Model:
    """Our model of a published config; what cannot be expressed is in `read.problems`."""
    heads, width = read.require("num_attention_heads"), read.require("hidden_size")
    act = read("hidden_act", "silu")
    if act not in ACTIVATIONS:
        read.problems.append(f"hidden_act can be {', '.join(ACTIVATIONS)} here; config.json has {act!r}")
    theta, scaling = rope(read)
    fields = dict(
        layers=read.require("num_hidden_layers"), pattern="D", d_model=width, heads=heads,
        kv_heads=read("num_key_value_heads", heads), head_dim=read("head_dim", width // heads),
        hidden=read.require("intermediate_size"), activation=ACTIVATIONS.get(act, "swiglu"),
        norm_eps=float(read("rms_norm_eps", 1e-6)), rope_theta=theta, rope_scaling=scaling,
        vocab=read.require("vocab_size"), tied=bool(read("tie_word_embeddings", False)))
    return Model(**fields | family.read(read))


def rope(read: Reader) -> tuple[float, str]:
    """Theta and our text of the scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    found, theta = rope_reader(read), read("rope_theta", 10_000.0)
    if any(isinstance(value, dict) for value in found.values.values()):
        read.problems.append(f"rope_parameters are the same for all layers here; config.json has {found.values}")
        return theta, ""
    part = found("partial_rotary_factor", read("partial_rotary_factor", 1.0))
    if part != 1.0:
        read.problems.append(f"rotary positions turn whole heads here; config.json has partial_rotary_factor {part}")
    longest = read("max_position_embeddings", 2048)
    original = found("original_max_position_embeddings", read("original_max_position_embeddings", longest))
    kind, numbers = found("rope_type", found("type", "default")), {}
    if kind == "default":
        kind = ""
    elif kind == "linear":
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
    else:
        read.problems.append(f"a rotary scaling is linear, dynamic, llama3 or yarn here; config.json has {kind!r}")
        kind = ""
    text = " ".join([kind, *(f"{name}={number!r}" for name, number in numbers.items())])
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
    kinds = read("layer_types")
    window, count = read("sliding_window"), read.require("num_hidden_layers")
    if kinds is not None and (len(kinds) != count or set(kinds) - {"sliding_attention", "full_attention"}):
        read.problems.append("layer_types has sliding_attention or full_attention for every layer; config.json has "
                             f"{kinds}")
        kinds = None
    text = ""
    for i in range(count):
        slides = bool(window) and (windowed(i) if kinds is None else kinds[i] == "sliding_attention")
        letter = "M" if experts(i) else "D"
        text += letter.lower() if slides else letter
    return {"pattern": shortest(text), "window": window if text != text.upper() else None}


def shortest(text: str) -> str:
    """The shortest pattern that, repeated, gives the text."""
    return next(text[:n] for n in range(1, len(text) + 1) if (text[:n] * len(text))[:len(text)] == text)


def moe(read: Reader, **fields: Any) -> MoE:
    """Dropless, as published models run."""
    return MoE(**{"active": read("num_experts_per_tok", 2), "capacity_factor": None, "dispatcher": "blocked",
                  "balance_loss": float(read("router_aux_loss_coef", 0.0)), "z_loss": 0.0} | fields)


def biases(**parts: Any) -> tuple[str, ...]:
    return tuple(name for name, there in parts.items() if there)


def llama(read: Reader) -> dict[str, Any]:
    attention = read("attention_bias", False)
    return {"biases": biases(qkv=attention, output=attention, mlp=read("mlp_bias", False))}


def mistral(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: False, lambda i: True)


def mixtral(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: True) | {"moe": moe(
        read, experts=read("num_local_experts", 8), hidden=read.require("intermediate_size"),
        jitter=float(read("router_jitter_noise", 0.0)))}


def qwen_layers(read: Reader, windowed: Callable[[int], bool]) -> dict[str, Any]:
    dense, step = read("mlp_only_layers", []), read("decoder_sparse_step", 1)
    found = letters(read, lambda i: i not in dense and (i + 1) % step == 0, windowed)
    if not read("use_sliding_window", False):
        found = {"pattern": found["pattern"].upper(), "window": None}
    return found


def qwen2_moe(read: Reader) -> dict[str, Any]:
    first = read("max_window_layers", 28)
    return qwen_layers(read, lambda i: i % 2 == 0 and i < first) | {
        "biases": biases(qkv=read("qkv_bias", True)),
        "moe": moe(read, experts=read("num_experts", 60), active=read("num_experts_per_tok", 4),
                   hidden=read("moe_intermediate_size", 1408), shared=read("shared_expert_intermediate_size", 5632),
                   shared_gate=True, renormalise=bool(read("norm_topk_prob", False)))}


def qwen3_moe(read: Reader) -> dict[str, Any]:
    attention = read("attention_bias", False)
    return qwen_layers(read, lambda i: True) | {
        "qk_norm": "head", "biases": biases(qkv=attention, output=attention),
        "moe": moe(read, experts=read("num_experts", read("num_local_experts", 128)),
                   active=read("num_experts_per_tok", 8), hidden=read("moe_intermediate_size", 768),
                   renormalise=bool(read("norm_topk_prob", False)))}


def olmoe(read: Reader) -> dict[str, Any]:
    attention = read("attention_bias", False)
    return letters(read, lambda i: True, lambda i: False) | {
        "qk_norm": "all", "biases": biases(qkv=attention, output=attention), "qkv_limit": read("clip_qkv"),
        "moe": moe(read, experts=read("num_experts", 64), active=read("num_experts_per_tok", 8),
                   hidden=read.require("intermediate_size"), renormalise=bool(read("norm_topk_prob", False)))}


def phimoe(read: Reader) -> dict[str, Any]:
    attention = read("attention_bias", False)
    return letters(read, lambda i: True, lambda i: True) | {
        "norm": "layernorm", "biases": biases(qkv=attention, output=attention, norm=True,
                                              head=read("lm_head_bias", False)),
        "moe": moe(read, experts=read("num_local_experts", 16), hidden=read.require("intermediate_size"),
                   router="sparsemixer", mixer_gap=float(read("router_jitter_noise", 0.01)),
                   jitter=float(read("input_jitter_noise", 0.0)))}


def granitemoe(read: Reader) -> dict[str, Any]:
    attention = read("attention_bias", False)
    return letters(read, lambda i: True, lambda i: False) | {
        "biases": biases(qkv=attention, output=attention),
        "multipliers": (float(read("embedding_multiplier", 1.0)), float(read("residual_multiplier", 1.0)),
                        float(read("attention_multiplier", 1.0)), 1 / float(read("logits_scaling", 1.0))),
        "moe": moe(read, experts=read("num_local_experts", 8), hidden=read.require("intermediate_size"),
                   softmax="after")}


def gpt_oss(read: Reader) -> dict[str, Any]:
    attention = read("attention_bias", True)
    return letters(read, lambda i: True, lambda i: i % 2 == 0) | {
        "activation": "clamped_swiglu",
        "clamp": (float(read("swiglu_alpha", 1.702)), float(read("swiglu_limit", 7.0))),
        "biases": biases(qkv=attention, output=attention, sinks=True, experts=True, router=True),
        "moe": moe(read, experts=read("num_local_experts", read("num_experts", 128)),
                   active=read("num_experts_per_tok", 4), hidden=read.require("intermediate_size"), softmax="after")}


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
    moe_hidden = read("moe_intermediate_size", 2048)
    return letters(read, lambda i: i >= first, lambda i: False) | {
        "kv_heads": heads, "head_dim": still + turned, "multipliers": (1.0, 1.0, scale, 1.0) if scale else (),
        "latent": (read("q_lora_rank", 0) if "q_lora_rank" in read.values else 1536, read("kv_lora_rank", 512), turned,
                   read("v_head_dim", 128)),
        "biases": biases(output=read("attention_bias", False)),
        "moe": moe(read, experts=read("n_routed_experts", read("num_local_experts", 256)),
                   active=read("num_experts_per_tok", 8), hidden=moe_hidden, shared=moe_hidden * read(
                       "n_shared_experts", 1), router="sigmoid", renormalise=bool(read("norm_topk_prob", True)),
                   scale=float(read("routed_scaling_factor", 2.5)), expert_groups=read("n_group", 8),
                   active_groups=read("topk_group", 4))}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", (*OUTSIDE, *ATTENTION, *DENSE), llama),
    "mistral": Family("MistralForCausalLM", (*OUTSIDE, *ATTENTION, *DENSE), mistral, {
        "num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family("MixtralForCausalLM", (*OUTSIDE, *ATTENTION, *MIXTRAL_EXPERTS), mixtral, {
        "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", (
        *OUTSIDE, *ATTENTION, *DENSE, *QWEN_EXPERTS, *mlp("mlp.shared_expert.", "feed.shared."),
        Entry(LAYER + "mlp.shared_expert_gate.weight", "feed.shared_gate", "one embed")), qwen2_moe,
        {"num_key_value_heads": 16, "sliding_window": 4096}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", (*OUTSIDE, *ATTENTION, *HEAD_NORMS, *DENSE, *QWEN_EXPERTS), qwen3_moe, {
        "num_key_value_heads": 4, "sliding_window": 4096}),
    "olmoe": Family("OlmoeForCausalLM", (*OUTSIDE, *ATTENTION, *WHOLE_NORMS, *QWEN_EXPERTS), olmoe, {
        "rms_norm_eps": 1e-5}),
    "phimoe": Family("PhimoeForCausalLM", (*OUTSIDE, *ATTENTION, *MIXTRAL_EXPERTS), phimoe, {
        "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}),
    "granitemoe": Family("GraniteMoeForCausalLM", (
        *OUTSIDE, *ATTENTION, Entry(LAYER + "block_sparse_moe.router.layer.weight", "feed.router", "choice embed"),
        Entry(LAYER + "block_sparse_moe.input_linear.weight", "feed.up", "expert (gate hidden) embed"),
        Entry(LAYER + "block_sparse_moe.output_linear.weight", "feed.down", "expert embed hidden")), granitemoe),
    "gpt_oss": Family("GptOssForCausalLM", (
        *OUTSIDE, *ATTENTION, Entry(LAYER + "mlp.router.weight", "feed.router", "choice embed"),
        Entry(LAYER + "mlp.router.bias", "feed.router_bias", "choice"),
        Entry(LAYER + "mlp.experts.gate_up_proj", "feed.up", "expert embed (hidden gate)"),
        Entry(LAYER + "mlp.experts.gate_up_proj_bias", "feed.up_bias", "expert (hidden gate)"),
        Entry(LAYER + "mlp.experts.down_proj", "feed.down", "expert hidden embed"),
        Entry(LAYER + "mlp.experts.down_proj_bias", "feed.down_bias", "expert norm")), gpt_oss, {
            "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rope_theta": 150_000.0,
            "rms_norm_eps": 1e-5}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", (
        *OUTSIDE, *LATENT, *DENSE, *QWEN_EXPERTS, *mlp("mlp.shared_experts.", "feed.shared."),
        Entry(LAYER + "mlp.gate.e_score_correction_bias", "feed.bias", "choice")), deepseek_v3),
}


def describe(model: Model, family: Family, longest: int) -> dict[str, Any]:
    """A config.json of this family for a model: what reading it back gives says how far the family can express it.

    Args:
        longest: tokens of a sequence, for max_position_embeddings.
    """
    moe, kinds, shared = model.moe, model.layer_kinds(), model.moe.shared
    first = kinds.index("M") if "M" in kinds else len(kinds)
    latent_ = model.latent or (0, 0, model.head_dim, model.head_dim)
    scale = model.multipliers or (1.0, 1.0, 0.0, 1.0)
    kind, numbers = model.rope()
    longest = int(numbers["original"]) if kind == "dynamic" else longest
    one_width = "M" in kinds and family.read in (mixtral, olmoe, phimoe, granitemoe, gpt_oss)
    every = {
        "hidden_size": model.d_model, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads, "head_dim": latent_[2], "vocab_size": model.vocab,
        "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied, "max_position_embeddings": longest,
        "hidden_act": next((name for name, ours in ACTIVATIONS.items() if ours == model.activation), "silu"),
        "rope_parameters": rope_parameters(model), "intermediate_size": moe.hidden if one_width else model.hidden,
        "sliding_window": model.window, "use_sliding_window": model.window is not None,
        "max_window_layers": model.layers,
        "layer_types": ["sliding_attention" if letter.islower() else "full_attention"
                        for letter in model.layer_letters()],
        "attention_bias": "output" in model.biases, "qkv_bias": "qkv" in model.biases,
        "mlp_bias": "mlp" in model.biases, "lm_head_bias": "head" in model.biases,
        "num_local_experts": moe.experts, "num_experts": moe.experts, "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.active, "moe_intermediate_size": moe.hidden, "norm_topk_prob": moe.renormalise,
        "router_aux_loss_coef": moe.balance_loss, "input_jitter_noise": moe.jitter,
        "router_jitter_noise": moe.mixer_gap if family.read is phimoe else moe.jitter,
        "shared_expert_intermediate_size": shared, "n_shared_experts": shared // moe.hidden,
        "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "D"], "decoder_sparse_step": 1,
        "first_k_dense_replace": first, "n_group": moe.expert_groups, "topk_group": moe.active_groups,
        "routed_scaling_factor": moe.scale, "q_lora_rank": latent_[0] or None, "kv_lora_rank": latent_[1],
        "qk_rope_head_dim": latent_[2], "qk_nope_head_dim": model.head_dim - latent_[2], "v_head_dim": latent_[3],
        "rope_interleave": True, "clip_qkv": model.qkv_limit, "swiglu_alpha": model.clamp[0],
        "swiglu_limit": model.clamp[1], "embedding_multiplier": scale[0], "residual_multiplier": scale[1],
        "attention_multiplier": scale[2] or model.head_dim**-0.5, "logits_scaling": 1 / scale[3]}
    read = family.reader(every)
    model_of(family, read)
    asked = read.asked | ({"rope_interleave"} if model.latent else set())
    return {key: value for key, value in every.items() if key in asked}


def rope_parameters(model: Model) -> dict[str, Any]:
    kind, numbers = model.rope()
    names = {"low": "low_freq_factor", "high": "high_freq_factor", "original": "original_max_position_embeddings",
             "fast": "beta_fast", "slow": "beta_slow", "attention": "attention_factor"}
    found = {names.get(name, name): number for name, number in numbers.items()}
    found |= {key: kind(found[key]) for key, kind in (("truncate", bool), (names["original"], int)) if key in found}
    return {"rope_type": kind or "default", "rope_theta": model.rope_theta} | found


def unlike(model: Model, other: Model) -> list[str]:
    """The fields in which two models compute something else, in words."""
    def plain(model: Model) -> dict[str, Any]:
        kinds, moe = model.layer_kinds(), asdict(model.moe)
        found = asdict(model) | {"pattern": model.layer_letters(), "moe": None, "biases": sorted(model.biases)}
        kind, numbers = model.rope()
        if kind == "yarn":  # what it is where it is not said
            numbers = {"fast": 32, "slow": 1, "truncate": 1, "attention": yarn_factor(numbers["factor"])} | numbers
        found["rope_scaling"] = (kind, sorted(numbers.items()))
        found["multipliers"] = model.multipliers or (1.0, 1.0, 0.0, 1.0)
        found["multipliers"] = tuple(round(x or model.head_dim**-0.5, 12) for x in found["multipliers"])
        unused = {"hidden": "D" not in kinds, "window": found["pattern"] == kinds,
                  "clamp": model.activation != "clamped_swiglu", "kv_heads": bool(model.latent)}
        of_training = ("group", "capacity_factor", "priority", "jitter", "balance_loss", "balance_scope", "z_loss",
                       "bias_rate", "dispatcher")
        if "M" in kinds:
            unused |= {"moe." + name: True for name in of_training}
            unused["moe.mixer_gap"] = model.moe.router != "sparsemixer"
            unused["moe.softmax"] = model.moe.router != "topk"
            unused["moe.renormalise"] = model.moe.router in ("sparsemixer", "expert_choice")
            if model.moe.router == "topk" and moe["softmax"] == "after":  # the same as choosing after the softmax
                moe |= {"softmax": "before", "renormalise": True}
            found |= {f"moe.{name}": value for name, value in moe.items()}
        return {name: value for name, value in found.items() if not unused.get(name)}

    a, b = plain(model), plain(other)
    return [f"model.{name}={a.get(name)!r} (it has {b.get(name)!r})" for name in a if a.get(name) != b.get(name)]

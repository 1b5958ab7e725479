"""Families of published checkpoints: a table from their tensors to our weights, and the way back of their config.

An `Entry` names the dimensions of a tensor by the axes of our weight (model/weights.py), so that the permutation
follows from the two; several axes in brackets share a dimension.  The model never asks for a family's name: what a
family needs is a value in the config.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from moejax.config import Model
from moejax.hf.reading import (
    ACTIVATIONS,
    Reader,
    deepseek_v3,
    gpt_oss,
    granitemoe,
    llama,
    mistral,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    rope,
)
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


@dataclass(frozen=True)
class Family:
    """`read` gives the fields of Model that differ from the common ones."""

    architecture: str
    entries: tuple[Entry, ...]
    read: Callable[[Reader], dict[str, Any]]
    silent: Mapping[str, Any] = field(default_factory=dict)  # what it means that a config lacks a key, where not null

    def reader(self, published: Mapping[str, Any]) -> "Reader":
        return Reader({**self.silent, **published})


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

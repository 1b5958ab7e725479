"""Families of published checkpoints: a table from their tensors to our weights, and the way back of their config.

An `Entry` names the dimensions of a tensor by the axes of our weight (model/weights.py), so that the permutation
follows from the two; several axes in brackets share a dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from moejax.config import CROSSED, Model
from moejax.hf import reading
from moejax.hf.reading import ACTIVATIONS, ENCODER_ACTIVATIONS, ROPE_KEYS, Reader
from moejax.model.rotary import yarn_factor


class Entry(NamedTuple):
    """One kind of tensor.

    `there` has {layer} and {expert} for numbers, {cross} of layers with cross-attention, {block} of the image encoder
    and {depth} of the resampler; `here` ends the name of our weight; an axis marked ~ ends in entries that rotary
    positions turn in neighbouring pairs, where ours turn halves; 1 is a dimension of one entry.
    """

    there: str
    here: str
    axes: str
    gate: int | None = None  # the tensor is this one of the matrices into the hidden layer
    rows: str | range | None = None  # of ours, along the first axis: those that this key of config.json counts


def both(there: str, here: str, axes: str, bias: str = "norm", gate: int | None = None) -> tuple[Entry, Entry]:
    """A matrix and its bias."""
    return Entry(f"{there}.weight", here, axes, gate), Entry(f"{there}.bias", f"{here}_bias", bias, gate)


def norm(there: str, here: str) -> tuple[Entry, Entry]:
    return Entry(f"{there}.weight", f"{here}.scale", "norm"), Entry(f"{there}.bias", f"{here}.bias", "norm")


def attention(there: str, output: str = "o_proj") -> tuple[Entry, ...]:
    """The matrices in and out of heads."""
    return (*both(f"{there}q_proj", "attention.q", "(heads head) embed", "(heads head)"),
            *both(f"{there}k_proj", "attention.k", "(kv head) embed", "(kv head)"),
            *both(f"{there}v_proj", "attention.v", "(kv head) embed", "(kv head)"),
            *both(f"{there}{output}", "attention.o", "embed (heads head)"))


def mlp(there: str, here: str, names: str = "gate_proj up_proj down_proj") -> tuple[Entry, ...]:
    """The three matrices of a gated MLP, or of every expert."""
    gate, up, down = (f"{there}{name}" for name in names.split())
    return (*both(gate, f"{here}up", "hidden embed", "hidden", 0), *both(up, f"{here}up", "hidden embed", "hidden", 1),
            *both(down, f"{here}down", "embed hidden"))


LAYER = "model.layers.{layer}."
HEADS, MLP, SPARSE = (LAYER + part for part in ("self_attn.", "mlp.", "block_sparse_moe."))
OUTSIDE = (
    Entry("model.embed_tokens.weight", "embedding", "vocab embed"), *norm("model.norm", "norm"),
    *both("lm_head", "head", "vocab embed", "vocab"), *norm(LAYER + "input_layernorm", "attention_norm"),
    *norm(LAYER + "post_attention_layernorm", "feed_norm"))
ATTENTION = (*attention(HEADS), Entry(HEADS + "sinks", "attention.sinks", "heads"))
HEAD_NORMS = tuple(Entry(f"{HEADS}{x}_norm.weight", f"attention.{x}_norm", "head") for x in "qk")
WHOLE_NORMS = (Entry(HEADS + "q_norm.weight", "attention.q_norm", "(heads head)"),
               Entry(HEADS + "k_norm.weight", "attention.k_norm", "(kv head)"))
LATENT = (Entry(HEADS + "q_proj.weight", "attention.q", "(heads head~) embed"),
          *both(HEADS + "q_a_proj", "attention.q_down", "queries embed", "queries"),
          Entry(HEADS + "q_a_layernorm.weight", "attention.q_norm", "queries"),
          Entry(HEADS + "q_b_proj.weight", "attention.q", "(heads head~) queries"),
          *both(HEADS + "kv_a_proj_with_mqa", "attention.kv_down", "mixed~ embed", "mixed~"),
          Entry(HEADS + "kv_a_layernorm.weight", "attention.kv_norm", "keys"),
          Entry(HEADS + "kv_b_proj.weight", "attention.kv", "(heads both) keys"),
          *both(HEADS + "o_proj", "attention.o", "embed (heads head)"))
DENSE = mlp(MLP, "feed.mlp.")
ROUTER = "feed.router", "choice embed"
MIXTRAL_EXPERTS = (*mlp(SPARSE + "experts.{expert}.", "feed.", "w1 w3 w2"), Entry(SPARSE + "gate.weight", *ROUTER))
QWEN_EXPERTS = (*mlp(MLP + "experts.{expert}.", "feed."), Entry(MLP + "gate.weight", *ROUTER))


def seeing(prefix: str) -> tuple[Entry, ...]:
    """An image encoder of CLIP's or SigLIP's."""
    block, head, ours = f"{prefix}encoder.layers.{{block}}.", f"{prefix}head.", "vision.encoder."
    return (
        Entry(f"{prefix}embeddings.class_embedding", f"{ours}token", "embed"),
        *both(f"{prefix}embeddings.patch_embedding", f"{ours}patch", "embed colour row column"),
        Entry(f"{prefix}embeddings.position_embedding.weight", f"{ours}positions", "place embed"),
        *norm(f"{prefix}pre_layrnorm", f"{ours}pre_norm"), *norm(f"{prefix}post_layernorm", f"{ours}post_norm"),
        *norm(f"{block}layer_norm1", "attention_norm"), *norm(f"{block}layer_norm2", "feed_norm"),
        *both(f"{block}mlp.fc1", "feed.mlp.up", "hidden embed", "hidden", 0),
        *attention(f"{block}self_attn.", "out_proj"), *both(f"{block}mlp.fc2", "feed.mlp.down", "embed hidden"),
        Entry(f"{head}probe", f"{ours}pool.probe", "1 1 norm"),
        Entry(f"{head}attention.in_proj_weight", f"{ours}pool.qkv", "(three heads head) embed"),
        Entry(f"{head}attention.in_proj_bias", f"{ours}pool.qkv_bias", "(three heads head)"),
        *both(f"{head}attention.out_proj", f"{ours}pool.o", "embed (heads head)"),
        *norm(f"{head}layernorm", f"{ours}pool.norm"),
        *both(f"{head}mlp.fc1", f"{ours}pool.mlp.up", "hidden embed", "hidden", 0),
        *both(f"{head}mlp.fc2", f"{ours}pool.mlp.down", "embed hidden"))


CROSS, RESAMPLER = "model.gated_cross_attn_layers.{cross}.", "model.perceiver_resampler."
DEPTH = RESAMPLER + "blocks.{depth}."
IDEFICS = (
    *(entry for entry in OUTSIDE if entry.here not in ("embedding", "head")), *ATTENTION, *DENSE,
    *(Entry(f"{there}{part}.weight", here, "vocab embed", rows=rows)
      for there, here, more in (("model.embed_tokens", "embedding", "embedding"), ("lm_head", "head", "fc"))
      for part, rows in (("", "vocab_size"), (f".additional_{more}", "additional_vocab_size"))),
    *seeing("model.vision_model."),
    *norm(CROSS + "input_layernorm", "norm"), *norm(CROSS + "post_attention_layernorm", "feed_norm"),
    *attention(CROSS + "cross_attn."), *mlp(CROSS + "mlp.", "mlp."),
    *(Entry(f"{CROSS}cross_attn.{x}_layer_norm.weight", f"attention.{x}_norm", "head") for x in "qk"),
    *(Entry(CROSS + there, here, axes) for there, here in (("alpha_cross_attn", "gate"), ("alpha_dense", "feed_gate"))
      for axes in ("one", "1 1 norm")), Entry(RESAMPLER + "latents", "vision.resampler.latents", "latent embed"),
    *norm(RESAMPLER + "layer_norm", "vision.resampler.norm"), *attention(DEPTH + "0.", "output_proj"),
    *norm(DEPTH + "0.context_layer_norm", "context_norm"), *norm(DEPTH + "0.latents_layer_norm", "norm"),
    *(entry for x in "qk" for entry in both(f"{DEPTH}0.{x}_layer_norm", f"attention.{x}_norm", "head", "head")),
    *norm(DEPTH + "1.ln", "feed_norm"), Entry(DEPTH + "1.fc.weight", "mlp.up", "hidden embed", 0),
    Entry(DEPTH + "1.c_proj.weight", "mlp.down", "embed hidden"))


class Family(NamedTuple):
    """`read` gives the fields of Model that differ from the common ones."""

    architecture: str
    entries: tuple[Entry, ...]
    read: Callable[[Reader], dict[str, Any]]
    silent: Mapping[str, Any] = {}  # what it means that a config lacks a key, where not null

    def reader(self, published: Mapping[str, Any], inside: str = "") -> Reader:
        return Reader({**self.silent, **published}, inside)

    def encoder(self) -> bool:
        """Whether its models are encoders of images alone."""
        return self.read in (reading.clip, reading.siglip)


def model_of(family: Family, read: Reader) -> Model:
    """Our model of a published config; what cannot be expressed is in `read.problems`."""
    if family.encoder():
        return Model(layers=0, **family.read(read))
    heads, width = read.require("num_attention_heads"), read.require("hidden_size")
    theta, scaling = reading.rope(read)
    return Model(**dict(
        layers=read.require("num_hidden_layers"), pattern="D", d_model=width, heads=heads,
        kv_heads=read("num_key_value_heads", heads), head_dim=read("head_dim", width // heads),
        hidden=read.require("intermediate_size"), activation=ACTIVATIONS[read.only("hidden_act", *ACTIVATIONS)],
        norm_eps=read("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
        vocab=read.require("vocab_size"), tied=read("tie_word_embeddings", False)) | family.read(read))


MIXTRAL = {"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", (*OUTSIDE, *ATTENTION, *DENSE), reading.llama),
    "mistral": Family("MistralForCausalLM", (*OUTSIDE, *ATTENTION, *DENSE), reading.mistral, {
        "num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family("MixtralForCausalLM", (*OUTSIDE, *ATTENTION, *MIXTRAL_EXPERTS), reading.mixtral, MIXTRAL),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", (
        *OUTSIDE, *ATTENTION, *DENSE, *QWEN_EXPERTS, *mlp(MLP + "shared_expert.", "feed.shared."),
        Entry(MLP + "shared_expert_gate.weight", "feed.shared_gate", "one embed")), reading.qwen2_moe,
        {"num_key_value_heads": 16, "sliding_window": 4096}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", (*OUTSIDE, *ATTENTION, *HEAD_NORMS, *DENSE, *QWEN_EXPERTS),
                        reading.qwen3_moe, {"num_key_value_heads": 4, "sliding_window": 4096}),
    "olmoe": Family("OlmoeForCausalLM", (*OUTSIDE, *ATTENTION, *WHOLE_NORMS, *QWEN_EXPERTS), reading.olmoe, {
        "rms_norm_eps": 1e-5}),
    "phimoe": Family("PhimoeForCausalLM", (*OUTSIDE, *ATTENTION, *MIXTRAL_EXPERTS), reading.phimoe, MIXTRAL),
    "granitemoe": Family("GraniteMoeForCausalLM", (
        *OUTSIDE, *ATTENTION, Entry(SPARSE + "router.layer.weight", *ROUTER),
        Entry(SPARSE + "input_linear.weight", "feed.up", "expert (gate hidden) embed"),
        Entry(SPARSE + "output_linear.weight", "feed.down", "expert embed hidden")), reading.granitemoe),
    "gpt_oss": Family("GptOssForCausalLM", (
        *OUTSIDE, *ATTENTION, *both(MLP + "router", *ROUTER, "choice"),
        Entry(MLP + "experts.gate_up_proj", "feed.up", "expert embed (hidden gate)"),
        Entry(MLP + "experts.gate_up_proj_bias", "feed.up_bias", "expert (hidden gate)"),
        Entry(MLP + "experts.down_proj", "feed.down", "expert hidden embed"),
        Entry(MLP + "experts.down_proj_bias", "feed.down_bias", "expert norm")), reading.gpt_oss, MIXTRAL | {
            "head_dim": 64, "sliding_window": 128, "rope_theta": 150_000.0}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", (
        *OUTSIDE, *LATENT, *DENSE, *QWEN_EXPERTS, *mlp(MLP + "shared_experts.", "feed.shared."),
        Entry(MLP + "gate.e_score_correction_bias", "feed.bias", "choice")), reading.deepseek_v3),
    "clip_vision_model": Family("CLIPVisionModel", seeing("vision_model."), reading.clip),
    "siglip_vision_model": Family("SiglipVisionModel", seeing("vision_model."), reading.siglip),
    "idefics": Family("IdeficsForVisionText2Text", IDEFICS, reading.idefics, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32})}
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # with a half that reads, which is left out


def describe(model: Model, family: Family, longest: int) -> dict[str, Any]:
    """A config.json for a model and `longest` tokens at most; reading it back says how far the family expresses it."""
    moe, kinds = model.moe, model.layer_kinds()
    latent_ = model.latent or (0, 0, model.head_dim, model.head_dim)
    scale = model.multipliers or (1.0, 1.0, 0.0, 1.0)
    kind, numbers = model.rope()
    one_width = "M" in kinds and family.read in reading.ONE_WIDTH
    every = {
        "hidden_size": model.d_model, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads, "head_dim": latent_[2], "vocab_size": model.vocab,
        "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied,
        "max_position_embeddings": int(numbers["original"]) if kind == "dynamic" else longest,
        "hidden_act": next((name for name, ours in ACTIVATIONS.items() if ours == model.activation), "silu"),
        "rope_parameters": rope_parameters(model), "intermediate_size": moe.hidden if one_width else model.hidden,
        "sliding_window": model.window, "use_sliding_window": bool(model.window), "max_window_layers": model.layers,
        "layer_types": [reading.SLIDES if letter.islower() else reading.FULL for letter in model.layer_letters()],
        "attention_bias": "output" in model.biases, "qkv_bias": "qkv" in model.biases,
        "mlp_bias": "mlp" in model.biases, "lm_head_bias": "head" in model.biases,
        "num_local_experts": moe.experts, "num_experts": moe.experts, "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.active, "moe_intermediate_size": moe.hidden, "norm_topk_prob": moe.renormalise,
        "router_aux_loss_coef": moe.balance_loss, "input_jitter_noise": moe.jitter,
        "router_jitter_noise": moe.mixer_gap if family.read is reading.phimoe else moe.jitter,
        "shared_expert_intermediate_size": moe.shared, "n_shared_experts": moe.shared // moe.hidden,
        "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "D"], "decoder_sparse_step": 1,
        "first_k_dense_replace": f"{kinds}M".index("M"), "n_group": moe.expert_groups, "topk_group": moe.active_groups,
        "routed_scaling_factor": moe.scale, "q_lora_rank": latent_[0] or None, "kv_lora_rank": latent_[1],
        "qk_rope_head_dim": latent_[2], "qk_nope_head_dim": model.head_dim - latent_[2], "v_head_dim": latent_[3],
        "rope_interleave": True, "clip_qkv": model.qkv_limit, "swiglu_alpha": model.clamp[0],
        "swiglu_limit": model.clamp[1], "embedding_multiplier": scale[0], "residual_multiplier": scale[1],
        "attention_multiplier": scale[2] or model.head_dim**-0.5, "logits_scaling": 1 / scale[3]}
    read = family.reader(every := every | sight(model, family))
    model_of(family, read)
    return {key: value for key, value in every.items() if key in read.asked}


def sight(model: Model, family: Family) -> dict[str, Any]:
    """What a config.json says of images."""
    told, look = model.encoder(), model.looks()
    if told is None or not (family.encoder() or (family.read is reading.idefics and look)):
        return {}
    found = {
        "hidden_size": told.width, "intermediate_size": told.hidden, "num_hidden_layers": told.layers,
        "num_attention_heads": told.heads, "num_channels": 3, "image_size": told.size, "patch_size": told.patch,
        "hidden_act": next(name for name, ours in ENCODER_ACTIVATIONS.items() if ours == told.act),
        "layer_norm_eps": told.eps}
    if family.encoder():
        return found | {"vision_use_head": bool(told.pool)}
    perceiver = {} if not look.latents else {
        "resampler_n_latents": look.latents, "resampler_depth": look.depth, "resampler_n_heads": look.heads,
        "resampler_head_dim": look.head, "qk_layer_norms_perceiver": look.latent_norm == "head"}
    found["embed_dim"] = found.pop("hidden_size")
    crossed = [i for i, letter in enumerate(model.layer_letters()) if letter in CROSSED]
    return {"additional_vocab_size": 0, "vision_config": found, "perceiver_config": perceiver,
            "cross_layer_interval": [*crossed, model.layers, model.layers][1], "use_resampler": look.latents > 0,
            "alpha_type": "vector" if look.gate == "vector" else "float", "qk_layer_norms": look.norm == "head"}


def rope_parameters(model: Model) -> dict[str, Any]:
    kind, numbers = model.rope()
    found = {ROPE_KEYS[name]: number for name, number in numbers.items()}
    found |= {key: kind(found[key]) for key, kind in (("truncate", bool), (ROPE_KEYS["original"], int)) if key in found}
    return {"rope_type": kind or "default", "rope_theta": model.rope_theta} | found


OF_TRAINING = ("group", "capacity_factor", "priority", "jitter", "balance_loss", "balance_scope", "z_loss", "bias_rate",
               "dispatcher")  # fields of MoE


def unlike(model: Model, other: Model) -> list[str]:
    """The fields in which two models compute something else, in words."""
    a, b = computed(model), computed(other)
    return [f"model.{name}={a.get(name)!r} (it has {b.get(name)!r})" for name in a if a.get(name) != b.get(name)]


def computed(model: Model) -> dict[str, Any]:
    """The fields of a model that decide what it computes, and what goes without saying."""
    told, look, kinds, moe = model.encoder(), model.looks(), model.layer_kinds(), asdict(model.moe)
    seen = {"vision": told and told.kind, "cross": look and look.kind}
    if told:  # how pixels are made ready is said elsewhere
        seen |= {f"vision.{name}": it for name, it in vars(told).items() if name not in ("fit", "mean", "std")}
        seen |= {"vision.grid": told.grid or told.size // told.patch,
                 "vision.pool": told.pool and told.kind == "siglip"}
    if look:
        inner = () if look.latents else ("depth", "heads", "head", "latent_norm")
        seen |= {f"cross.{name}": value for name, value in vars(look).items() if name not in inner}
    if not model.layers:
        return {"layers": 0} | seen
    kind, numbers = model.rope()
    if kind == "yarn":
        numbers = {"fast": 32, "slow": 1, "truncate": 1, "attention": yarn_factor(numbers["factor"])} | numbers
    found = asdict(model) | seen | {
        "pattern": model.layer_letters(), "moe": None, "biases": sorted(model.biases),
        "rope_scaling": (kind, sorted(numbers.items())),
        "multipliers": tuple(round(x or model.head_dim**-0.5, 12) for x in model.multipliers or (1.0, 1.0, 0.0, 1.0))}
    unused = {"hidden": not set(found["pattern"].upper()) & set("DVW"), "window": found["pattern"].isupper(),
              "clamp": model.activation != "clamped_swiglu", "kv_heads": bool(model.latent)}
    if "M" in kinds:
        router = model.moe.router
        if router == "topk" and moe["softmax"] == "after":  # the same as choosing after the softmax
            moe |= {"softmax": "before", "renormalise": True}
        found |= {f"moe.{name}": value for name, value in moe.items() if name not in OF_TRAINING}
        unused |= {"moe.mixer_gap": router != "sparsemixer", "moe.softmax": router != "topk",
                   "moe.renormalise": router in ("sparsemixer", "expert_choice")}
    return {name: value for name, value in found.items() if not unused.get(name)}

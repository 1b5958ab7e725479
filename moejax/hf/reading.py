"""How each family's published config becomes fields of our model; what that cannot do is collected as problems."""

from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import TEXTS, MoE
from moejax.model.rotary import yarn_factor

SLIDES, FULL = "sliding_attention", "full_attention"  # of a layer, in layer_types
KINDS = {int: ("a whole number", ", 1 or more", 2**24), float: ("a number", " above 0", 1e30),  # beyond: a mistake
         bool: ("true or false", "", 0), str: ("text", "", 0), list: ("a list", "", 0), dict: ("a JSON object", "", 0)}
ZERO = ("first_k_dense_replace", "max_window_layers", "n_shared_experts", "shared_expert_intermediate_size",
        "qk_nope_head_dim", "router_jitter_noise")  # may be 0, and so may what is 0 by default


class Reader:
    """A published config; remembers what was asked of it, and what our model cannot do.  `inside` is part of it."""

    def __init__(self, values: Mapping[str, Any], inside: str = "", problems: list[str] | None = None):
        self.values, self.asked, self.inside = values, set(), inside
        self.problems = [] if problems is None else problems

    def __call__(self, key: str, default: Any) -> Any:
        """A value of another kind than the default is a problem, and the default; null is as if it were not there."""
        self.asked.add(key)
        value, kind = self.values.get(key), type(default)
        if value is None:
            return default
        (what, least, limit), zero = KINDS[kind], default == 0 or key in ZERO
        if type(value) is kind or (type(value), kind) == (int, float):
            if not limit or 0 < value < limit or (zero and value == 0):
                return kind(value)
        self.problem(f"config.json must hold {what}{least * (not zero)}, as {self.inside}{key}; it has {value!r}")
        return default

    def problem(self, text: str) -> None:
        """As a key may be asked for twice, each is told once."""
        if text not in self.problems:
            self.problems.append(text)

    def require(self, key: str, kind: type[int] | type[float] = int) -> Any:
        if self.values.get(key) is None:
            self.problem(f"config.json must hold {self.inside}{key}; it does not")
        return self(key, kind(1))

    def only(self, key: str, default: Any, *others: Any) -> Any:
        """One of these values: another is a problem, and the default."""
        value, right = self(key, default), dict.fromkeys((default, *others))
        if value in right:
            return value
        self.problem(f"{self.inside}{key} can be {' or '.join(map(repr, right))} here; config.json has {value!r}")
        return default


ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ENCODER_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu_exact", "gelu_pytorch_tanh": "gelu",
                       "gelu_new": "gelu", "relu": "relu"}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
IDEFICS = CLIP | {"intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
                  "hidden_act": "gelu"}
ROPE_KEYS = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "fast": "beta_fast",
             "slow": "beta_slow", "attention": "attention_factor", "original": "original_max_position_embeddings",
             "truncate": "truncate"}  # our names of a scaling's numbers, and the published


def rope(read: Reader) -> tuple[float, str]:
    """Theta and our text of the scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    found, theta = rope_reader(read), read("rope_theta", 10_000.0)
    if any(isinstance(value, dict) for value in found.values.values()):
        read.problems.append(f"rope_parameters are the same for all layers here; config.json has {found.values}")
        return theta, ""
    if (part := found("partial_rotary_factor", read("partial_rotary_factor", 1.0))) != 1.0:
        read.problems.append(f"rotary positions turn whole heads here; config.json has partial_rotary_factor {part}")
    longest, kind = read("max_position_embeddings", 2048), found("rope_type", found("type", "default"))
    original = found("original_max_position_embeddings", read("original_max_position_embeddings", longest))
    if kind not in ("default", *TEXTS["rope_scaling"]):
        read.problems.append(f"a rotary scaling is linear, dynamic, llama3 or yarn here; config.json has {kind!r}")
    numbers = {"original": longest if kind == "dynamic" else original}
    if kind == "yarn":
        factor, scale, whole = found("factor", longest / original), found("mscale", 0.0), found("mscale_all_dim", 0.0)
        usual = yarn_factor(factor, scale) / yarn_factor(factor, whole) if scale and whole else yarn_factor(factor)
        numbers |= {"factor": factor, "fast": found("beta_fast", 32.0), "slow": found("beta_slow", 1.0),
                    "truncate": int(found("truncate", True)), "attention": found("attention_factor", 0.0) or usual}
    says = TEXTS["rope_scaling"].get(kind, ())
    numbers |= {name: found.require(ROPE_KEYS[name], float) for name in says if name not in numbers}
    return found("rope_theta", theta), " ".join([kind, *(f"{name}={numbers[name]!r}" for name in says)]) if says else ""


def rope_reader(read: Reader) -> Reader:
    name = "rope_parameters" if read("rope_parameters", {}) else "rope_scaling"
    return Reader(read(name, {}), f"{name}.", read.problems)


def letters(read: Reader, experts: Callable[[int], bool], windowed: Callable[[int], bool]) -> dict[str, Any]:
    """Pattern and window, from which layers have experts and whose attention slides."""
    kinds, window, count = read("layer_types", []), read("sliding_window", 0), read.require("num_hidden_layers")
    if kinds and (len(kinds) != count or any(kind not in (SLIDES, FULL) for kind in kinds)):
        read.problems.append(f"layer_types can be {SLIDES} or {FULL} for each layer; config.json has {kinds}")
        kinds = []
    slides = [bool(window) and (kinds[i] == SLIDES if kinds else windowed(i)) for i in range(count)]
    text = "".join("DdMm"[2 * experts(i) + slides[i]] for i in range(count))
    return {"pattern": shortest(text), "window": window if text != text.upper() else None}


def shortest(text: str) -> str:
    """The shortest pattern that, repeated, gives the text."""
    return next(text[:n] for n in range(1, len(text) + 1) if (text[:n] * len(text))[:len(text)] == text)


def moe(read: Reader, experts: int, active: int = 2, **fields: Any) -> MoE:
    """Dropless, as published models run; `active` where config.json does not say it."""
    return MoE(**{"experts": experts, "active": read("num_experts_per_tok", active), "z_loss": 0.0,
                  "hidden": read.require("intermediate_size"), "balance_loss": read("router_aux_loss_coef", 0.0),
                  "capacity_factor": None, "dispatcher": "blocked"} | fields)


def biases(read: Reader, attention: bool = False, **parts: bool) -> tuple[str, ...]:
    """Of attention where config.json says so, or else by `attention`, and of these parts."""
    attention = read("attention_bias", attention)
    return tuple(name for name, there in {"qkv": attention, "output": attention, **parts}.items() if there)


def llama(read: Reader) -> dict[str, Any]:
    return {"biases": biases(read, mlp=read("mlp_bias", False))}


def mistral(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: False, lambda i: True)


def mixtral(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: True) | {
        "moe": moe(read, read("num_local_experts", 8), jitter=read("router_jitter_noise", 0.0))}


def qwen_layers(read: Reader, windowed: Callable[[int], bool]) -> dict[str, Any]:
    dense, step = read("mlp_only_layers", []), read("decoder_sparse_step", 1)
    found = letters(read, lambda i: i not in dense and (i + 1) % step == 0, windowed)
    if not read("use_sliding_window", False):
        found = {"pattern": found["pattern"].upper(), "window": None}
    return found


def qwen2_moe(read: Reader) -> dict[str, Any]:
    first = read("max_window_layers", 28)
    return qwen_layers(read, lambda i: i % 2 == 0 and i < first) | {"biases": ("qkv",) * read("qkv_bias", True),
        "moe": moe(read, read("num_experts", 60), 4, hidden=read("moe_intermediate_size", 1408), shared_gate=True,
                   shared=read("shared_expert_intermediate_size", 5632), renormalise=read("norm_topk_prob", False))}


def qwen3_moe(read: Reader) -> dict[str, Any]:
    return qwen_layers(read, lambda i: True) | {"qk_norm": "head", "biases": biases(read),
        "moe": moe(read, read("num_experts", read("num_local_experts", 128)), 8,
                   hidden=read("moe_intermediate_size", 768), renormalise=read("norm_topk_prob", False))}


def olmoe(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: False) | {
        "qk_norm": "all", "biases": biases(read), "qkv_limit": read("clip_qkv", 0.0) or None,
        "moe": moe(read, read("num_experts", 64), 8, renormalise=read("norm_topk_prob", False))}


def phimoe(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: True) | {
        "norm": "layernorm", "biases": biases(read, norm=True, head=read("lm_head_bias", False)),
        "moe": moe(read, read("num_local_experts", 16), router="sparsemixer",
                   mixer_gap=read("router_jitter_noise", 0.01), jitter=read("input_jitter_noise", 0.0))}


def granitemoe(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: False) | {
        "biases": biases(read), "moe": moe(read, read("num_local_experts", 8), softmax="after"),
        "multipliers": (read("embedding_multiplier", 1.0), read("residual_multiplier", 1.0),
                        read("attention_multiplier", 1.0), 1 / read("logits_scaling", 1.0))}


def gpt_oss(read: Reader) -> dict[str, Any]:
    return letters(read, lambda i: True, lambda i: i % 2 == 0) | {
        "activation": "clamped_swiglu", "clamp": (read("swiglu_alpha", 1.702), read("swiglu_limit", 7.0)),
        "biases": biases(read, True, sinks=True, experts=True, router=True),
        "moe": moe(read, read("num_local_experts", read("num_experts", 128)), 4, softmax="after")}


ONE_WIDTH = (mixtral, olmoe, phimoe, granitemoe, gpt_oss)  # whose experts are as wide as `intermediate_size` says


def deepseek_v3(read: Reader) -> dict[str, Any]:
    first, heads = read("first_k_dense_replace", 3), read.require("num_attention_heads")
    still, turned = read("qk_nope_head_dim", 128), read("qk_rope_head_dim", 64)
    read.only("num_key_value_heads", heads)
    read("rope_interleave", True)  # which decides the names of axes
    read.only("topk_method", "noaux_tc")
    read.only("scoring_func", "sigmoid")
    found, scale = rope_reader(read), 0.0
    if found("rope_type", found("type", "default")) != "default" and (whole := found("mscale_all_dim", 0.0)):
        scale = (still + turned) ** -0.5 * yarn_factor(found.require("factor", float), whole) ** 2
    hidden = read("moe_intermediate_size", 2048)
    return letters(read, lambda i: i >= first, lambda i: False) | {
        "kv_heads": heads, "head_dim": still + turned, "multipliers": (1.0, 1.0, scale, 1.0) if scale else (),
        "latent": (read("q_lora_rank", 0) if "q_lora_rank" in read.values else 1536, read("kv_lora_rank", 512), turned,
                   read("v_head_dim", 128)), "biases": ("output",) * read("attention_bias", False),
        "moe": moe(read, read("n_routed_experts", read("num_local_experts", 256)), 8, router="sigmoid", hidden=hidden,
                   shared=hidden * read("n_shared_experts", 1), renormalise=read("norm_topk_prob", True),
                   expert_groups=read("n_group", 8), active_groups=read("topk_group", 4),
                   scale=read("routed_scaling_factor", 2.5))}


def encoder(read: Reader, kind: str, usual: Mapping[str, Any], more: str = "") -> str:
    """Our text of an image encoder."""
    act, names = read.only("hidden_act", usual["hidden_act"], *ENCODER_ACTIVATIONS), {
        "size": "image_size", "patch": "patch_size", "width": "hidden_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "hidden": "intermediate_size", "eps": "layer_norm_eps"}
    read.only("num_channels", 3)
    return " ".join([kind, *(f"{name}={read(key, usual[key])!r}" for name, key in names.items()),
                     f"act={ENCODER_ACTIVATIONS[act]}{more}"])


def clip(read: Reader) -> dict[str, Any]:
    return {"vision": encoder(read, "clip", CLIP)}


def siglip(read: Reader) -> dict[str, Any]:
    return {"vision": encoder(read, "siglip", SIGLIP, f" pool={int(read('vision_use_head', True))}")}


def idefics(read: Reader) -> dict[str, Any]:
    """Flamingo's successor: the images that its processor lets a token see are the last before it."""
    every, count, heads = read("cross_layer_interval", 1), read("num_hidden_layers", 1), read("num_attention_heads", 1)
    width, norms = read("hidden_size", 1), {True: "head", False: "none"}
    found = read("vision_config", {})
    seen = Reader(found | {"hidden_size": found.get("embed_dim")}, "vision_config.", read.problems)
    inner = Reader(read("perceiver_config", {}), "perceiver_config.", read.problems)
    if count % every:
        read.problem(f"cross_layer_interval must divide num_hidden_layers here; config.json has {every} and {count}")
    gate = {"float": "number", "vector": "vector"}[read.only("alpha_type", "float", "vector")]
    look = f"last feed=every gate={gate} norm={norms[read('qk_layer_norms', False)]}"
    if read("use_resampler", False):
        look += (f" latents={inner('resampler_n_latents', 64)} depth={inner('resampler_depth', 6)} "
                 f"heads={inner('resampler_n_heads', 16)} head={inner('resampler_head_dim', 96)} "
                 f"latent_norm={norms[inner('qk_layer_norms_perceiver', False)]}")
    return {"pattern": shortest(("W" + "D" * (every - 1)) * max(count // every, 1)), "kv_heads": heads,
            "head_dim": width // heads, "vocab": read.require("vocab_size") + read("additional_vocab_size", 0),
            "vision": encoder(seen, "clip", IDEFICS, " fit=squash"), "cross": look}

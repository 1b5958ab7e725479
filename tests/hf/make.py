"""Tiny random checkpoints of Hugging Face families with what transformers computes from them, for the parity tests.

Run by an interpreter that has torch and transformers: `python tests/hf/make.py [NAME ...]` writes them into
tests/fixtures.  Each folder holds config.json, model.safetensors and reference.npz, whose keys are

    input_ids "B T", logits "B T V", hidden_last "B T D" (after the last norm),
    router_topk_index_i, router_topk_weights_i "B*T A" (i counts the MoE layers; in no order within a token),
    aux_loss (where the class has one), gen_input "B T", gen_tokens "B new" (greedy).

Those of image encoders are pixels "N 3 S S" (normalised), hidden "N P W", pooled "N W" (where there is one), and with
`large_` before them of a larger image with interpolated positions.  Idefics has input_ids, pixels "B I 3 S S",
looks "B T I", logits, hidden_last and image_hidden "B I O W".

Everything is float32 on the CPU, with eager attention and eager experts.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).parents[1] / "fixtures"
BATCH, LENGTH, NEW = 2, 24, 12
GREEDY, ROUTER = 1e-3, 1e-4  # the least gaps between what is chosen and what is not; floats differ by under 1e-5

# Small, and no two sizes alike that could be mistaken for each other.
BASE = dict(vocab_size=128, hidden_size=40, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3, pad_token_id=None,
            bos_token_id=None, eos_token_id=None)
SPARSE = dict(num_experts_per_tok=3, router_aux_loss_coef=0.02)
DEEPSEEK = dict(
    num_hidden_layers=3, num_key_value_heads=4, intermediate_size=22, moe_intermediate_size=8, n_routed_experts=8,
    num_experts_per_tok=3, first_k_dense_replace=1, n_shared_experts=2, routed_scaling_factor=2.5, kv_lora_rank=14,
    qk_rope_head_dim=8, qk_nope_head_dim=6, v_head_dim=10,
    rms_norm_eps=1e-5)  # but of the norms of the latents it is always 1e-6


def rope(kind: str, theta: float = 10_000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | values}


# name -> (config class, keyword arguments on top of BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", dict(sliding_window=7, head_dim=8)),
    "llama_linear": ("LlamaConfig", rope("linear", factor=3.0)),
    "llama_dynamic": ("LlamaConfig", dict(max_position_embeddings=16) | rope("dynamic", factor=2.0)),
    "llama_llama3": ("LlamaConfig", rope(
        "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)),
    "llama_yarn": ("LlamaConfig", rope(
        "yarn", 10.0, factor=2.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=1.0)),
    "llama_bias": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=14)),
    "qwen2_moe": ("Qwen2MoeConfig", SPARSE | dict(
        num_hidden_layers=3, mlp_only_layers=[1], intermediate_size=26, moe_intermediate_size=10,
        shared_expert_intermediate_size=12, num_experts=8, norm_topk_prob=False)),
    "qwen3_moe_dense": ("Qwen3MoeConfig", SPARSE | dict(
        hidden_size=32, num_hidden_layers=4, decoder_sparse_step=2, moe_intermediate_size=10, head_dim=12,
        num_local_experts=8, norm_topk_prob=False)),
    "olmoe": ("OlmoeConfig", SPARSE | dict(
        intermediate_size=14, num_experts=8, norm_topk_prob=False, clip_qkv=0.8)),
    "phimoe": ("PhimoeConfig", SPARSE | dict(
        intermediate_size=12, num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
        router_jitter_noise=0.2)),  # with the published 0.01 nearly all logits but the largest are masked
    "granitemoe": ("GraniteMoeConfig", SPARSE | dict(
        intermediate_size=14, num_local_experts=8, embedding_multiplier=0.7, logits_scaling=1.7,
        residual_multiplier=0.6, attention_multiplier=0.21, tie_word_embeddings=True)),
    "gpt_oss": ("GptOssConfig", SPARSE | dict(
        num_hidden_layers=3, intermediate_size=12, head_dim=8, num_local_experts=6, sliding_window=8,
        swiglu_limit=1.5) | rope("yarn", 150_000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                                 original_max_position_embeddings=256) | dict(max_position_embeddings=8192)),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK | dict(
        n_group=4, topk_group=2, q_lora_rank=18, max_position_embeddings=512) | rope(
            "yarn", 100.0, factor=4.0, original_max_position_embeddings=128, beta_fast=4.0, beta_slow=1.0, mscale=1.0,
            mscale_all_dim=0.7)),
    "deepseek_v3_plain": ("DeepseekV3Config", DEEPSEEK | dict(
        n_group=1, topk_group=1, q_lora_rank=None, num_mtp_layers=0)),
}

SEEING = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, image_size=30,
              patch_size=7, layer_norm_eps=1e-3)  # of 30 the last 2 rows and columns belong to no patch
READING = dict(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
LOOKING = dict(vocab_size=64, hidden_size=24, intermediate_size=28, num_attention_heads=4, rms_norm_eps=1e-3,
               max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None)
IDEFICS_SEEING = dict(embed_dim=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, image_size=22,
                      patch_size=7, hidden_act="gelu", layer_norm_eps=1e-3)

# name -> (class, config class, keyword arguments)
IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip_vision_gelu": ("CLIPVisionModel", "CLIPVisionConfig", SEEING | dict(hidden_act="gelu")),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", SEEING),
    "siglip_vision_plain": ("SiglipVisionModel", "SiglipVisionConfig", SEEING | dict(
        vision_use_head=False, hidden_act="relu", image_size=29)),
    "clip": ("CLIPModel", "CLIPConfig", dict(
        vision_config=SEEING, text_config=READING | dict(eos_token_id=3), projection_dim=12)),
    "siglip": ("SiglipModel", "SiglipConfig", dict(
        vision_config=SEEING, text_config=READING)),
    "idefics_vector": ("IdeficsForVisionText2Text", "IdeficsConfig", LOOKING | dict(
        num_hidden_layers=6, cross_layer_interval=3, additional_vocab_size=4, alpha_type="vector", qk_layer_norms=True,
        use_resampler=True, tie_word_embeddings=True, vision_config=IDEFICS_SEEING, perceiver_config=dict(
            use_resampler=True, qk_layer_norms_perceiver=True, resampler_depth=3, resampler_head_dim=10,
            resampler_n_heads=2, resampler_n_latents=5))),
    "idefics_plain": ("IdeficsForVisionText2Text", "IdeficsConfig", LOOKING | dict(
        num_hidden_layers=2, cross_layer_interval=1, use_resampler=False, vision_config=IDEFICS_SEEING | dict(
            hidden_act="quick_gelu"))),
}


def make_images(name: str, folder: Path, seed: int = 0, **changes: Any) -> dict[str, float]:
    """As `make`, without choices that could be close calls."""
    kind, config, values = IMAGES[name]
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, kind)._from_config(getattr(transformers, config)(**values | changes))
    fill(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model, draw = load_images(folder), torch.Generator().manual_seed(seed)
    size = getattr(model.config, "vision_config", model.config).image_size
    if not kind.startswith("Idefics"):
        inputs = {prefix: torch.randn(3, 3, side, side, generator=draw) for prefix, side in (
            ("", size), ("large_", size + 14))}
        reference = {f"{prefix}pixels": pixels for prefix, pixels in inputs.items()}
        for prefix, pixels in inputs.items():
            reference |= {f"{prefix}{key}": value for key, value in look(model, pixels, bool(prefix)).items()}
    else:
        count = model.config.vocab_size + model.config.additional_vocab_size
        reference = {"input_ids": torch.randint(count, (BATCH, LENGTH), generator=draw),
                     "pixels": torch.randn(BATCH, 2, 3, size, size, generator=draw)}
        looks = torch.zeros(BATCH, LENGTH, 2, dtype=torch.int64)
        looks[0, 3:11, 0], looks[0, 11:, 1], looks[1, 5:, 1] = 1, 1, 1
        reference["looks"] = looks
        reference |= read(model, reference)
    np.savez_compressed(folder / "reference.npz", **{key: value.numpy() for key, value in reference.items()})
    return {"seed": seed}


def load_images(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def look(model: Any, pixels: torch.Tensor, interpolate: bool) -> dict[str, torch.Tensor]:
    out = getattr(model, "vision_model", model)(pixels, interpolate_pos_encoding=interpolate)
    pooled = {} if out.pooler_output is None else {"pooled": out.pooler_output}
    return {"hidden": out.last_hidden_state} | pooled


@torch.no_grad()
def read(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens, pixels, looks = (torch.as_tensor(inputs[key]) for key in ("input_ids", "pixels", "looks"))
    out = model.model(tokens, pixel_values=pixels, image_attention_mask=looks, use_cache=False)
    return {"logits": model.lm_head(out.last_hidden_state), "hidden_last": out.last_hidden_state,
            "image_hidden": out.image_hidden_states}


def make(name: str, folder: Path, seed: int = 0, **changes: Any) -> dict[str, float]:
    """The checkpoint and its reference of the first seed from `seed` whose choices are no close calls; its margins."""
    for number in range(seed, seed + 100):
        shutil.rmtree(folder, ignore_errors=True)
        write(name, folder, number, changes)
        reference, margins = run(folder, number)
        varied = min(len(set(row)) for row in reference["gen_tokens"].tolist()) > 2
        if varied and margins["cached"] and margins["greedy"] > GREEDY and margins["router"] > ROUTER:
            np.savez_compressed(folder / "reference.npz", **reference)
            return {"seed": number} | margins
    raise RuntimeError(f"no seed from {seed} gives clear choices for {name}")


def write(name: str, folder: Path, seed: int, changes: dict[str, Any]) -> None:
    kind, values = CASES[name]
    config = getattr(transformers, kind)(**BASE | values | changes)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Random numbers in every weight, also where a fresh model has zeros or ones."""
    draw = torch.Generator().manual_seed(seed)
    arrays = dict(model.named_parameters()) | {
        name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    for name, value in arrays.items():
        noise = torch.randn(value.shape, generator=draw)
        if re.search(r"(norm\d?|\.ln)\.weight$", name):
            value.copy_(1 + 0.3 * noise)
        elif name.endswith("sinks") or ".alpha_" in name:
            value.copy_(noise)
        else:
            value.copy_(noise * (0.3 if re.search(r"(gate|router)\.weight$|correction_bias", name) else 0.15))


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()


@torch.no_grad()
def run(folder: Path, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What transformers says of the checkpoint, and how clear its choices are."""
    model = load(folder)
    tokens = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    routers, seen = watch(model)
    out = model(tokens, output_hidden_states=True, use_cache=False, **{"output_router_logits": True} if routers else {})
    reference = {"input_ids": tokens, "logits": out.logits, "hidden_last": out.hidden_states[-1]}
    for i, (_, weights, index) in enumerate(seen):
        reference |= {f"router_topk_index_{i}": index, f"router_topk_weights_{i}": weights}
    if getattr(out, "aux_loss", None) is not None:
        reference["aux_loss"] = out.aux_loss
    # Greedy, once without a cache; dynamic rotations depend on what a model has seen before, so each has its own.
    whole, gap, model = tokens, np.inf, load(folder)
    for _ in range(NEW):
        best = model(whole, use_cache=False).logits[:, -1].topk(2)
        gap = min(gap, float((best.values[:, 0] - best.values[:, 1]).min()))
        whole = torch.cat([whole, best.indices[:, :1]], 1)
    cached = load(folder).generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False)
    reference |= {"gen_input": tokens, "gen_tokens": whole[:, LENGTH:]}
    routers, seen = watch(model)
    model(whole, use_cache=False)
    close = [clearness(router, logits) for router, (logits, _, _) in zip(routers, seen, strict=True)]
    precise = load(folder).double()(tokens, use_cache=False).logits
    margins = {"greedy": gap, "router": min(close, default=np.inf), "cached": bool((cached == whole).all()),
               "noise": float((precise - out.logits).abs().max()), "logits": float(out.logits.std())}
    kinds = {torch.int64: np.int32, torch.float32: np.float32}
    return {name: value.numpy().astype(kinds[value.dtype]) for name, value in reference.items()}, margins


def watch(model: torch.nn.Module) -> tuple[list[torch.nn.Module], list[tuple[torch.Tensor, ...]]]:
    """The routers in the order of their layers, and a list that fills with (logits, weights, index) of their calls."""
    seen: list[tuple[torch.Tensor, ...]] = []
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    for router in routers:
        router.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    return routers, seen


def clearness(router: Any, logits: torch.Tensor) -> float:
    """The least gap between what a router chose and what it did not."""
    def gap(scores: torch.Tensor, k: int) -> float:
        best = scores.sort(-1, descending=True).values
        return float((best[:, k - 1] - best[:, k]).min()) if k < best.shape[-1] else np.inf

    if hasattr(router, "router_jitter_noise"):  # what is masked is a choice too
        first = logits.topk(2).values
        masked = [(first[:, i:i + 1] - logits) / logits.abs().clamp(min=first[:, i:i + 1]) for i in range(2)]
        edges = torch.cat(masked, -1) - 2 * router.router_jitter_noise
        return min(gap(logits, 2), float(edges.abs().min()))
    if not hasattr(router, "e_score_correction_bias"):
        return gap(logits, router.top_k)
    scores = logits.sigmoid() + router.e_score_correction_bias
    groups = scores.reshape(len(scores), router.num_group, -1)
    best = groups.topk(2).values.sum(-1)
    left = torch.zeros_like(best).scatter(1, best.topk(router.topk_group).indices, 1).bool()
    kept = groups.masked_fill(~left[..., None], -torch.inf).flatten(1)
    return min(gap(best, router.topk_group), gap(kept, router.top_k))


def main(names: list[str]) -> None:
    for name in names or [*CASES, *IMAGES]:
        with tempfile.TemporaryDirectory() as place:
            margins = (make if name in CASES else make_images)(name, Path(place) / name)
            shutil.copytree(Path(place) / name, FIXTURES / name, dirs_exist_ok=True)
        size = sum(path.stat().st_size for path in (FIXTURES / name).iterdir())
        print(json.dumps({"name": name, "bytes": size} | margins), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

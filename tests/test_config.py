"""The config: what an override may say, every rule and its message, and the way to JSON and back."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest

from moejax import config as configs
from moejax.config import Checkpoint, Config, ConfigError, Data, Fault, Mesh, Model, MoE, Optimizer, Train, load_config

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
FIELDS = dict(configs.leaves(Config()))


def changed(*overrides: str) -> tuple[Config, list[str]]:
    return configs.override(Config(name="x", run_dir="x"), overrides)


def value(text: str):
    """What an override that must be right makes of its field."""
    config, problems = changed(text)
    assert problems == []
    return dict(configs.leaves(config))[text.partition("=")[0]][1]


def problems(*overrides: str) -> list[str]:
    """Everything wrong with the default config after these overrides."""
    config, found = changed(*overrides)
    return found + configs.check(config)


def problem(*overrides: str) -> str:
    found = problems(*overrides)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def unchecked():
    """Values of a wrong type get as far as in production, where nobody enforces the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def wrong_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path)
    return error.value.problems


# Overrides


@pytest.mark.parametrize("text, expected", [
    ("train.steps=20", 20), ("train.steps=1_000", 1000), ("data.seed=0", 0),
    ("optimizer.lr=1e-3", 1e-3), ("optimizer.clip=2", 2.0), ("model.rope_theta=5e5", 5e5),
    ("mesh.zero1=true", True), ("mesh.zero1=FALSE", False), ("mesh.sequence=1", True), ("model.tied=0", False),
    ("optimizer.name=muon", "muon"), ("train.compute=bfloat16", "bfloat16"),
    ("data.sources=a", ("a",)), ("data.sources=a.txt,b/*.jsonl", ("a.txt", "b/*.jsonl")), ("data.sources=", ()),
    ("model.moe.group=64", 64), ("model.moe.group=none", None), ("model.moe.capacity_factor=None", None),
    ("model.moe.capacity_factor=null", None), ("model.moe.eval_capacity_factor=1.5", 1.5),
    ("train.fault.loss_spike=none", None), ("train.fault.norm_spike=3", 3.0), ("checkpoint.folder=gs://a/b", "gs://a/b"),
    ("model.latent=0,8,4,6", (0, 8, 4, 6)), ("model.latent=(0,8,4,6)", (0, 8, 4, 6)), ("model.latent=", ()),
    ("model.biases=qkv,head", ("qkv", "head")), ("model.biases=", ()), ("model.caps=50,30.5", (50.0, 30.5)),
    ("model.multipliers=[12,0.22,0,0.1]", (12.0, .22, 0.0, .1)), ("model.clamp=1.5,9", (1.5, 9.0)),
    ("model.rope_scaling=yarn factor=4 original=64", "yarn factor=4 original=64"), ("model.window=none", None),
    ("model.window=128", 128), ("model.qkv_limit=8", 8.0), ("model.qk_norm=head", "head"),
    ("model.moe.router=sparsemixer", "sparsemixer"), ("model.moe.shared_gate=true", True),
    ("run_dir=a=b", "a=b"), ("name=größe 模型", "größe 模型"), ("run_dir=", "")])
def test_a_value_is_read_by_its_annotation(text, expected):
    got = value(text)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("text, kind", [
    ("train.steps=1e3", "a whole number"), ("train.steps=3.0", "a whole number"), ("train.steps=", "a whole number"),
    ("train.steps=0x10", "a whole number"), ("train.steps=none", "a whole number"),
    ("train.steps=\ud800", "a whole number"), ("train.steps=" + 5000 * "9", "a whole number"),
    ("optimizer.lr=fast", "a number"), ("optimizer.lr=", "a number"),
    ("optimizer.lr=none", "a number"), ("mesh.zero1=yes", "true or false"), ("mesh.zero1=2", "true or false"),
    ("mesh.zero1=", "true or false"), ("model.moe.group=", "a whole number or none"),
    ("model.moe.capacity_factor=off", "a number or none"), ("model.moe.capacity_factor=", "a number or none"),
    ("model.latent=0,8,four,6", "values separated by commas, each a whole number"),
    ("model.latent=0,8.5,4,6", "values separated by commas, each a whole number"),
    ("model.caps=high,30", "values separated by commas, each a number"),
    ("model.biases=qkv,Head,all",
     "values separated by commas, each one of qkv, output, sinks, mlp, experts, router, norm, head"),
    ("model.window=wide", "a whole number or none"),
    ("train.freeze=words", "values separated by commas, each one of text, encoder"),
    ("model.qk_norm=each", "one of none, head, all"), ("model.qkv_limit=", "a number or none"),
    ("model.activation=tanh", "one of gelu, gelu_exact, quick_gelu, relu, swiglu, geglu, clamped_swiglu"),
    ("model.moe.router=hash", "one of topk, sigmoid, sparsemixer, expert_choice"),
    ("optimizer.name=adam", "one of adamw, adafactor, muon"), ("optimizer.name=", "one of adamw, adafactor, muon"),
    ("train.remat=None", "one of none, weights, dots, full")])
def test_a_value_that_does_not_fit_is_refused_with_what_would(text, kind):
    path, _, given = text.partition("=")
    config, found = changed(text)
    assert found == [f"{path} takes {kind}; got {given!r}"]
    assert config == Config(name="x", run_dir="x")


def test_the_last_of_two_overrides_counts_and_others_stay():
    config, found = changed("train.steps=3", "model.moe.experts=16", "train.steps=4")
    assert found == []
    expected = Config(name="x", run_dir="x", train=Train(steps=4), model=Model(moe=MoE(experts=16)))
    assert config == expected


@pytest.mark.parametrize("key, near", [
    ("tain.steps", "train.steps"), ("steps", "train.steps"), ("modell.layers", "model.layers"), ("lr", "optimizer.lr"),
    ("moe.experts", "model.moe.experts"), ("train.clip", "optimizer.clip"), ("tain.seed", "train.seed"),
    ("seed", "data.seed"), ("optimizer.epsilon", "optimizer.eps"), ("model.moe.experts.x", "model.moe.experts")])
def test_an_unknown_key_names_the_nearest(key, near):
    assert problem(f"{key}=3") == f"unknown field {key!r}; did you mean {near}?"


@pytest.mark.parametrize("key", ["", "größe", "\ud800", "__class__"])
def test_a_key_near_nothing_lists_the_fields(key):
    assert problem(f"{key}=3") == f"unknown field {key!r}; fields are {', '.join(FIELDS)}"


def test_a_group_of_fields_is_not_a_field():
    assert problem("checkpoint=3") == ("checkpoint is a group of fields; set one of checkpoint.every, checkpoint.keep, "
                                       "checkpoint.keep_every, checkpoint.folder")
    assert problem("train.fault=3").startswith("train.fault is a group of fields; set one of train.fault.loss_spike, ")
    assert problem("model.moe=").startswith("model.moe is a group of fields; set one of model.moe.experts, model.moe.a")


@pytest.mark.parametrize("text", ["train.steps", "", "--steps", "train.steps:3"])
def test_an_override_has_an_equals_sign(text):
    assert problem(text) == f"an override is path.to.field=value; got {text!r}"


# Ranges


@pytest.mark.parametrize("text, message", [
    ("train.steps=0", "train.steps must be above 0; got 0; set it to 1 or more"),
    ("train.steps=-3", "train.steps must be above 0; got -3; set it to 1 or more"),
    *[(f"mesh.{axis}={n}", f"mesh.{axis} must be above 0; got {n}; set it to 1 or more")
      for axis in ("data", "fsdp", "pipeline", "expert", "tensor") for n in (0, -2)],
    ("optimizer.lr=0", "optimizer.lr must be above 0; got 0.0"),
    ("optimizer.lr=-1e-3", "optimizer.lr must be above 0; got -0.001"),
    ("optimizer.eps=0", "optimizer.eps must be above 0; got 0.0"),
    ("model.rope_theta=0", "model.rope_theta must be above 0; got 0.0"),
    ("model.qkv_limit=0", "model.qkv_limit must be above 0; got 0.0"),
    ("model.window=0", "model.window must be above 0; got 0; set it to 1 or more"),
    ("model.moe.mixer_gap=-0.1", "model.moe.mixer_gap must not be negative; got -0.1"),
    ("model.moe.capacity_factor=0", "model.moe.capacity_factor must be above 0; got 0.0"),
    *[(f"train.fault.{field}=0", f"train.fault.{field} must be above 0; got {zero}")
      for field, zero in (("loss_spike", "0.0"), ("norm_spike", "0.0"), ("limit", "0; set it to 1 or more"),
                          ("stall", "0.0"), ("heartbeat", "0; set it to 1 or more"))],
    ("checkpoint.keep=0", "checkpoint.keep must be above 0; got 0; set it to 1 or more"),
    ("checkpoint.keep_every=-1", "checkpoint.keep_every must not be negative; got -1"),
    ("data.seed=-1", "data.seed must not be negative; got -1"),
    ("optimizer.clip=-0.5", "optimizer.clip must not be negative; got -0.5"),
    ("data.validation=1.5", "data.validation must lie between 0 and 1; got 1.5"),
    ("optimizer.b1=-0.1", "optimizer.b1 must lie between 0 and 1; got -0.1"),
    ("optimizer.b2=1", "optimizer.b2 must be below 1, or nothing new is learned; got 1.0"),
    ("train.steps=2147483648", "train.steps must be below 2**31, as it is counted in 32 bits; got 2147483648"),
    (f"train.seed={10**400}", f"train.seed must be below 2**31, as it is counted in 32 bits; got {10**400}")])
def test_ranges(text, message):
    assert problem(text) == message


@pytest.mark.parametrize("path", [path for path, (kind, _) in FIELDS.items() if kind in (float, float | None)])
@pytest.mark.parametrize("given", ["nan", "inf", "-inf", "1e400"])
def test_a_number_is_finite(path, given):
    assert problem(f"{path}={given}") == f"{path} must be finite; got {float(given)}"


@pytest.mark.parametrize("path", [path for path, (kind, _) in FIELDS.items() if kind in (int, int | None)])
def test_no_whole_number_is_negative(path):
    assert any(f"{path} must" in each and "got -1" in each for each in problems(f"{path}=-1"))


def test_the_largest_allowed_are_allowed_at_once():
    assert problems("train.steps=2147483647", "data.seed=2147483647", "data.validation=1", "optimizer.final_lr=1") == []
    assert problems("model.heads=2147483647", "model.kv_heads=1") == []  # counting its divisors must not take minutes


# Rules


@pytest.mark.parametrize("overrides, message", [
    *((f"model.pattern={text}", "model.pattern is made of M (MoE layer) and D (dense layer), or V and W where they "
       f"look at images, small where attention has a window; got {text!r}") for text in ("MX", "", "x", "DM-")),
    ("model.pattern=Md", "small letters need model.window; got pattern 'Md' and no window; set it, or use capitals"),
    ("model.moe.shared_gate=true",
     "model.moe.shared_gate needs a shared expert; got model.moe.shared 0; set its width"),
    ("model.moe.router=sparsemixer model.moe.active=3",
     "router sparsemixer chooses 1 or 2 experts; got model.moe.active 3; set it to 2"),
    ("mesh.tensor=2 model.moe.shared=9",
     "mesh.tensor must divide model.moe.shared; got 2 and 9; set mesh.tensor to one of [1, 3, 9], "
     "or model.moe.shared=10"),
    ("model.clamp=1", "model.clamp has 2 numbers, finite and not negative; got (1.0,)"),
    ("model.clamp=", "model.clamp has 2 numbers, finite and not negative; got ()"),
    ("model.caps=50", "model.caps has 0 or 2 numbers, finite and not negative; got (50.0,)"),
    ("model.latent=8,4,6", "model.latent has 0 or 4 numbers, finite and not negative; got (8, 4, 6)"),
    ("model.multipliers=1,2,3,4,5",
     "model.multipliers has 0 or 4 numbers, finite and not negative; got (1.0, 2.0, 3.0, 4.0, 5.0)"),
    ("model.caps=-1,inf", "model.caps has 0 or 2 numbers, finite and not negative; got (-1.0, inf)"),
    ("model.multipliers=1,nan,1,1",
     "model.multipliers has 0 or 4 numbers, finite and not negative; got (1.0, nan, 1.0, 1.0)"),
    ("model.latent=0,8,4,6", "latent attention has as many KV heads as heads; got 1 and 8; set model.kv_heads=8"),
    *((f"model.kv_heads=8 model.latent={text.replace(' ', '')}",
       "latent attention has a rank of keys, a value size and an even turned part below model.head_dim; "
       f"got model.latent ({text}) and head_dim 32")
      for text in ("0, 0, 4, 6", "0, 8, 0, 6", "0, 8, 3, 6", "0, 8, 32, 6", "0, 8, 4, 0")),
    ("model.kv_heads=8 model.latent=0,8,4,6 model.biases=sinks,qkv,output model.qk_norm=all model.qkv_limit=8",
     "latent attention has no qkv, sinks, qk_norm, qkv_limit; take out one or the other"),
    ("model.kv_heads=3",
     "model.kv_heads must divide model.heads; got 3 and 8; set model.kv_heads to one of [1, 2, 4, 8], "
     "or model.heads=9"),
    ("model.head_dim=33", "model.head_dim must be even for the rotary embedding; got 33"),
    ("model.vocab=256", "model.vocab must hold the byte tokenizer's 257 tokens; got 256; set model.vocab=264"),
    ("model.moe.expert_groups=3",
     "model.moe.expert_groups must divide model.moe.experts; got 3 and 8; "
     "set model.moe.expert_groups to one of [1, 2, 4, 8], or model.moe.experts=9"),
    ("model.moe.active_groups=2", "model.moe.active_groups must not exceed model.moe.expert_groups; got 2 and 1"),
    ("model.moe.expert_groups=8",
     "the active groups must hold model.moe.active experts; 1 of 8 groups hold 1, active is 2; "
     "raise model.moe.active_groups"),
    ("model.moe.group=3 data.sequence=8",
     "model.moe.group must divide data.sequence; got 3 and 8; set model.moe.group to one of [1, 2, 4, 8], "
     "or data.sequence=9"),
    ("model.moe.router=expert_choice model.moe.capacity_factor=none",
     "router expert_choice fills experts to a capacity; model.moe.capacity_factor is none; set it to 1.0"),
    ("model.moe.router=expert_choice model.moe.expert_groups=2 model.moe.active_groups=2",
     "router expert_choice knows no expert groups; model.moe.expert_groups is 2; set it to 1"),
    ("mesh.tensor=3 model.moe.hidden=258",
     "mesh.tensor must divide model.heads; got 3 and 8; set mesh.tensor to one of [1, 2, 4, 8], or model.heads=9"),
    ("mesh.tensor=2 model.vocab=265",
     "mesh.tensor must divide model.vocab; got 2 and 265; set mesh.tensor to one of [1, 5, 53, 265], "
     "or model.vocab=266"),
    ("mesh.fsdp=3 model.d_model=64 data.batch=6",
     "mesh.fsdp must divide model.d_model; got 3 and 64; set mesh.fsdp to one of [1, 2, 4, 8, 16, 32, 64], "
     "or model.d_model=66"),
    ("mesh.tensor=2 model.pattern=DM model.hidden=5",
     "mesh.tensor must divide model.hidden; got 2 and 5; set mesh.tensor to one of [1, 5], or model.hidden=6"),
    ("mesh.tensor=2 model.moe.hidden=9",
     "mesh.tensor must divide model.moe.hidden; got 2 and 9; set mesh.tensor to one of [1, 3, 9], "
     "or model.moe.hidden=10"),
    ("mesh.expert=4 model.moe.experts=6",
     "mesh.expert must divide model.moe.experts; got 4 and 6; set mesh.expert to one of [1, 2, 3, 6], "
     "or model.moe.experts=8"),
    ("mesh.tensor=2 mesh.sequence=true data.sequence=9",
     "mesh.tensor must divide data.sequence; got 2 and 9; set mesh.tensor to one of [1, 3, 9], or data.sequence=10"),
    ("mesh.tensor=4 model.heads=12 model.kv_heads=6",
     "of mesh.tensor and model.kv_heads one must divide the other (KV heads are split or repeated); got 4 and 6"),
    ("data.batch=10 mesh.data=2 mesh.expert=2 train.microbatches=2",
     "data.batch must be a multiple of mesh.data × mesh.fsdp × mesh.expert × train.microbatches; "
     "got 10 and 2 × 1 × 2 × 2 = 8; set data.batch=16"),
    ("mesh.data=2 mesh.fsdp=4 mesh.expert=2 mesh.tensor=2 mesh.fake_devices=8",
     "the mesh axes must multiply to mesh.fake_devices; "
     "got data 2 × fsdp 4 × expert 2 × tensor 2 = 32 and 8; set mesh.fake_devices=32"),
    ("mesh.pipeline=3 mesh.chunks=2 mesh.schedule=interleaved train.microbatches=6 data.batch=6 model.layers=5",
     "every part of a pipeline needs a layer; got mesh.pipeline 3 × mesh.chunks 2 = 6 and model.layers 5; "
     "set mesh.pipeline=2 or lower"),
    ("mesh.pipeline=2 mesh.schedule=1f1",
     "mesh.schedule is one of 1f1b, gpipe, interleaved, zero_bubble, or the path of "
     "a .csv table; got '1f1'; did you mean 1f1b?"),
    ("mesh.pipeline=2 mesh.chunks=2", "only the schedule interleaved has several chunks; got 1f1b and mesh.chunks 2; "
     "set mesh.schedule=interleaved or mesh.chunks=1"),
    ("mesh.pipeline=2 mesh.chunks=2 mesh.schedule=interleaved",
     "the schedule interleaved takes microbatches in groups of mesh.pipeline; got train.microbatches 1 and "
     "mesh.pipeline 2; set train.microbatches=2"),
    *((f"mesh.pipeline=2 mesh.stage_layers={text}",
       "mesh.stage_layers gives each of mesh.pipeline × mesh.chunks = 2 parts a layer or more, and all 4 of "
       f"model.layers; got {got}; set it to 2,2, say")
      for text, got in (("[4]", "4 = 4"), ("[4,0]", "4 + 0 = 4, nothing on stage 1"), ("3,2", "3 + 2 = 5"))),
    ("mesh.pipeline=3 mesh.stage_layers=4,0,0", "mesh.stage_layers gives each of mesh.pipeline × mesh.chunks = 3 parts "
     "a layer or more, and all 4 of model.layers; got 4 + 0 + 0 = 4, nothing on stage 1, stage 2; "
     "set it to 2,1,1, say")])
def test_rules(overrides, message):
    assert problem(*overrides.split()) == message


@pytest.mark.parametrize("override, message", [
    ("model.rope_scaling=llama3 factor=8 low=4 high=4 original=64",
     "model.rope_scaling llama3 goes from low up to high; got low=4 and high=4; exchange them"),
    ("model.biases=qkv,qkv", "model.biases names each part once; got qkv, qkv"),
    ("model.rope_theta=1", "model.rope_theta must be above 1; got 1.0; set it to 10000")])
def test_rules_of_values_that_would_divide_by_nothing(override, message):
    assert problem(override) == message


@pytest.mark.parametrize("text, message", [
    *((text, f" is empty or begins with linear, dynamic, llama3, yarn; got {text!r}")
      for text in ("cubic factor=2", "factor=2", "linear=factor=2")),
    *((text, f"={text.split()[0]} needs {missing}; got {text!r}") for text, missing in (
        ("linear", "factor="), ("yarn factor=4", "original="), ("llama3 factor=8 low=1 original=64", "high="))),
    *((text, f"=linear takes each of factor once; got {name!r} in {text!r}")
      for text, name in (("linear factor=2 original=8", "original"), ("linear factor=2 factor=3", "factor"))),
    ("yarn factor=4 original=64 quick=3", "=yarn takes each of factor, original, fast, slow, attention, truncate once; "
     "got 'quick' in 'yarn factor=4 original=64 quick=3'")])
def test_a_text_has_a_kind_and_what_belongs_to_it(text: str, message: str):
    assert problem(f"model.rope_scaling={text}") == f"model.rope_scaling{message}"


def test_a_text_that_cannot_be_read_hides_nothing_else():
    assert problems("model.vision=vit", "model.pattern=V", "model.layers=0", "model.kv_heads=3", "data.batch=0") == [
        "data.batch must be above 0; got 0; set it to 1 or more",
        "model.vision is empty or begins with clip, siglip; got 'vit'",
        "model.kv_heads must divide model.heads; got 3 and 8; set model.kv_heads to one of [1, 2, 4, 8], "
        "or model.heads=9"]


@pytest.mark.parametrize("text, name, value", [
    ("linear factor=two", "factor", "two"), ("linear factor", "factor", ""), ("linear factor=nan", "factor", "nan"),
    ("dynamic factor=2 original=inf", "original", "inf"), ("linear factor=0", "factor", "0"),
    ("yarn factor=4 original=64 slow=0", "slow", "0")])
def test_a_number_of_a_rotary_scaling(text: str, name: str, value: str):
    assert problem(f"model.rope_scaling={text}") == (
        f"{name}= of model.rope_scaling takes a number above 0; got {value!r}")


@pytest.mark.parametrize(("text", "found"), [
    ("", ("", {})), ("linear factor=2", ("linear", {"factor": 2})), ("  linear   factor=2 ", ("linear", {"factor": 2})),
    ("dynamic factor=2 original=4_096", ("dynamic", {"factor": 2, "original": 4096})),
    ("llama3 original=8192 factor=8 low=1 high=4", ("llama3", {"original": 8192, "factor": 8, "low": 1, "high": 4})),
    ("yarn factor=4 original=64 truncate=0 attention=1.5",
     ("yarn", {"factor": 4, "original": 64, "truncate": 0, "attention": 1.5}))])
def test_a_rotary_scaling_is_read(text: str, found):
    config, wrong = changed(f"model.rope_scaling={text}")
    assert wrong == configs.check(config) == [] and config.model.rope() == found


def test_everything_wrong_with_a_models_values_comes_at_once():
    assert problems("model.pattern=Md", "model.clamp=1,2,3", "model.caps=1,-2", "model.biases=keys",
                    "model.rope_scaling=cubic", "model.moe.shared_gate=true", "model.moe.router=sparsemixer",
                    "model.moe.active=3", "model.qkv_limit=0") == [
        "model.biases takes values separated by commas, each one of qkv, output, sinks, mlp, experts, router, norm, "
        "head; got 'keys'",
        "model.qkv_limit must be above 0; got 0.0",
        "model.rope_scaling is empty or begins with linear, dynamic, llama3, yarn; got 'cubic'",
        "small letters need model.window; got pattern 'Md' and no window; set it, or use capitals",
        "model.clamp has 2 numbers, finite and not negative; got (1.0, 2.0, 3.0)",
        "model.caps has 0 or 2 numbers, finite and not negative; got (1.0, -2.0)",
        "model.moe.shared_gate needs a shared expert; got model.moe.shared 0; set its width",
        "router sparsemixer chooses 1 or 2 experts; got model.moe.active 3; set it to 2"]
    assert problems("model.latent=0,8,3,6", "model.biases=qkv") == [
        "latent attention has a rank of keys, a value size and an even turned part below model.head_dim; "
        "got model.latent (0, 8, 3, 6) and head_dim 32",
        "latent attention has as many KV heads as heads; got 1 and 8; set model.kv_heads=8",
        "latent attention has no qkv; take out one or the other"]


def test_letters_of_a_pattern():
    model = Model(layers=5, pattern="mDM", window=4)
    assert (model.layer_letters(), model.layer_kinds()) == ("mDMmD", "MDMMD")
    assert problems("model.pattern=mDd", "model.window=4") == []
    assert problems("model.pattern=MDDDm") == []  # the layers end before the small one
    assert problems("model.pattern=d", "model.window=4", "model.moe.shared_gate=true") == []  # there are no experts


def test_more_choices_than_experts():
    assert problems("model.moe.active=9") == [
        "model.moe.active must not exceed model.moe.experts; got 9 and 8",
        "the active groups must hold model.moe.active experts; 1 of 1 groups hold 8, active is 9; "
        "raise model.moe.active_groups"]


def test_one_wrong_axis_is_one_problem():
    """No repair that would be wrong itself."""
    assert problems("mesh.data=0", "mesh.fake_devices=4") == ["mesh.data must be above 0; got 0; set it to 1 or more"]
    assert problems("mesh.fake_devices=-1") == ["mesh.fake_devices must not be negative; got -1"]


def test_rules_of_what_a_model_does_not_have_do_not_bind():
    dense = ["model.pattern=D", "model.moe.active=9", "model.moe.group=3", "model.moe.router=expert_choice",
             "model.moe.capacity_factor=none", "mesh.tensor=2", "model.moe.hidden=9", "mesh.expert=1"]
    assert problems(*dense) == []
    assert problems("mesh.tensor=2", "model.hidden=5") == []  # without a dense layer
    assert problems("mesh.tensor=2", "data.sequence=9") == []  # unless activations are split
    assert problems("mesh.tensor=8", "model.kv_heads=1") == []  # KV heads are repeated
    assert problems("mesh.tensor=2", "model.kv_heads=4") == []  # or split


def test_all_problems_come_at_once(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from moejax.config import Config, Train\ndef config(): return Config(train=Train(steps=-1))\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["tain.seed=1", "optimizer.lr=fast", "model.kv_heads=3", "mesh.data=0", "data.batch"])
    assert error.value.problems == [
        "unknown field 'tain.seed'; did you mean train.seed?",
        "optimizer.lr takes a number; got 'fast'",
        "an override is path.to.field=value; got 'data.batch'",
        "mesh.data must be above 0; got 0; set it to 1 or more",
        "train.steps must be above 0; got -1; set it to 1 or more",
        "model.kv_heads must divide model.heads; got 3 and 8; set model.kv_heads to one of [1, 2, 4, 8], "
        "or model.heads=9"]
    assert str(error.value) == "\n".join(f"  - {each}" for each in error.value.problems)


# Files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_of_the_package_is_good(path):
    config = load_config(path)
    assert config.name == path.stem and config.run_dir == f"runs/{path.stem}"


def test_the_run_folder_follows_the_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from moejax.config import Config\ndef config(): return Config()\n")
    for overrides, name, run_dir in [
            ([], "mine", "runs/mine"), (["name=b"], "b", "runs/b"), (["name="], "mine", "runs/mine"),
            (["run_dir=c"], "mine", "c"), (["name=b", "run_dir="], "b", "runs/b")]:
        config = load_config(path, overrides)
        assert (config.name, config.run_dir) == (name, run_dir)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "tiny.py").touch()
    assert wrong_of(tmp_path / "tine.py") == [
        f"a config is a Python file; {tmp_path}/tine.py does not exist; did you mean {tmp_path}/tiny.py?"]
    assert wrong_of(tmp_path / "tiny") == [
        f"a config is a Python file; {tmp_path}/tiny does not exist; did you mean {tmp_path}/tiny.py?"]
    assert wrong_of(tmp_path / "other") == [f"a config is a Python file; {tmp_path}/other does not exist"]
    assert wrong_of(tmp_path / "no" / "tiny.py") == [f"a config is a Python file; {tmp_path}/no/tiny.py does not exist"]
    assert wrong_of(tmp_path) == [f"a config is a Python file; {tmp_path} is a folder"]


@pytest.mark.parametrize("text, what", [
    ("def config(", "SyntaxError: '(' was never closed (mine.py, line 1)"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ("def config():\n    return {}['a']", "KeyError: 'a'"),
    ("def config():\n    raise ValueError('no')", "ValueError: no"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("def config(mesh): pass", "TypeError: config() missing 1 required positional argument: 'mesh'"),
    ("from moejax.config import *\ndef config(): return Config(model=Model(layer=3))",
     "TypeError: Model.__init__() got an unexpected keyword argument 'layer'")])
def test_a_file_that_does_not_run_says_why(tmp_path, unchecked, text, what):
    path = tmp_path / "mine.py"
    path.write_text(text)
    (wrong,) = wrong_of(path)
    assert wrong.startswith(f"{path} gives no config: {what}")


def test_a_file_may_raise_what_is_wrong_itself(tmp_path):
    """One that builds on another with `load_config`, say."""
    path = tmp_path / "mine.py"
    path.write_text("from moejax.config import ConfigError\nraise ConfigError(['a', 'b'])")
    assert wrong_of(path) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "config = 3", "from moejax.config import Config\nconfig = Config()"])
def test_a_file_without_a_function_of_that_name(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert wrong_of(path) == [f"a config file defines config(), which returns a Config; that of {path} gives None"]


def test_a_function_that_returns_something_else(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def config(): return {}")
    assert wrong_of(path) == [f"a config file defines config(), which returns a Config; that of {path} gives {{}}"]


@pytest.mark.parametrize("text, message", [
    ("train=Train(steps='3')", "train.steps takes a whole number; got '3'"),
    ("train=Train(steps=True)", "train.steps takes a whole number; got True"),
    ("model=Model(layers=2.0)", "model.layers takes a whole number; got 2.0"),
    ("optimizer=Optimizer(lr=True)", "optimizer.lr takes a number; got True"),
    ("optimizer=Optimizer(name='sgd')", "optimizer.name takes one of adamw, adafactor, muon; got 'sgd'"),
    ("data=Data(sources=['a'])", "data.sources takes values separated by commas, each text; got ['a']"),
    ("data=Data(sources='abc')", "data.sources takes values separated by commas, each text; got 'abc'"),
    ("model=Model(moe=MoE(group=0.5))", "model.moe.group takes a whole number or none; got 0.5"),
    ("mesh=Mesh(zero1=1)", "mesh.zero1 takes true or false; got 1"),
    ("model=None", "model takes a moejax.config.Model; got None"),
    ("checkpoint=Train()", f"checkpoint takes a moejax.config.Checkpoint; got {Train()!r}")])
def test_a_value_of_a_wrong_type_in_a_file(tmp_path, unchecked, text, message):
    path = tmp_path / "mine.py"
    path.write_text(f"from moejax.config import *\ndef config(): return Config({text})")
    assert wrong_of(path) == [message]


def test_a_whole_number_is_a_number():
    assert configs.check(Config(optimizer=Optimizer(lr=1, clip=0))) == []


# The tree


def test_configs_are_values():
    one, two = Config(train=Train(steps=3)), Config(train=Train(steps=3))
    assert one == two and hash(one) == hash(two) and len({one, two, Config()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.train.steps = 4


def test_under_a_hundred_fields():
    assert len(FIELDS) < 100
    groups = (Model, MoE, Mesh, Data, Optimizer, Train, Fault, Checkpoint)
    # name, run_dir and hardware, and all of the groups but Model's own moe and Train's own fault
    assert len(FIELDS) == 3 + sum(len(dataclasses.fields(group)) for group in groups) - 2


def test_json_and_back():
    rare = Config(
        name="größe", run_dir='a "b"\n', model=Model(pattern="DM", moe=MoE(group=32, capacity_factor=None)),
        mesh=Mesh(tensor=2, zero1=True), data=Data(sources=("a", "b,c"), validation=0.0),
        optimizer=Optimizer(lr=0.1 + 0.2, eps=1e-12),
        train=Train(compute="bfloat16", fault=Fault(loss_spike=None, limit=3)))
    lists = Config(name="x", run_dir="x", model=Model(
        kv_heads=8, latent=(0, 8, 4, 6), biases=("output", "head"), caps=(50, 0.0), multipliers=(12.0, 0.22, 0, 0.1),
        clamp=(1.5, 9), window=3, rope_scaling="yarn factor=4 original=64", moe=MoE(router="sparsemixer")))
    for config in (Config(), rare, lists, *(load_config(path) for path in FILES)):
        assert configs.from_json(configs.to_json(config)) == config
    assert configs.from_json("{}") == Config()  # a field that a later version adds has its default


@pytest.mark.parametrize("text, messages", [
    ('{"modle": {"heads": 2}, "train": {"step": 3}, "zzzzz": {"zzzzz": 1}}',
     ["unknown field 'modle.heads'; did you mean model.heads?", "unknown field 'train.step'; did you mean train.steps?",
      f"unknown field 'zzzzz.zzzzz'; fields are {', '.join(FIELDS)}"]),
    ('{"train": {"steps": "20"}}', ["train.steps takes a whole number; got '20'"]),
    ('{"train": {"steps": -1}}', ["train.steps must be above 0; got -1; set it to 1 or more"]),
    ('{"optimizer": {"lr": NaN}}', ["optimizer.lr must be finite; got nan"]),
    ('{"data": {"sources": [["a"]]}}', ["data.sources takes values separated by commas, each text; got (['a'],)"]),
    *((text, ["checkpoint is a group of fields; set one of checkpoint.every, checkpoint.keep, checkpoint.keep_every, "
              "checkpoint.folder"]) for text in ('{"checkpoint": 3}', '{"checkpoint": null}', '{"checkpoint": {}}')),
    ("[]", ["a config is a JSON object; this text is not (it is [])"]),
    ('{"train": {', ["a config is a JSON object; this text is not (Expecting property name enclosed in double quotes: "
                     "line 1 column 12 (char 11))"])])
def test_json_that_is_no_config(unchecked, text, messages):
    with pytest.raises(ConfigError) as error:
        configs.from_json(text)
    assert error.value.problems == messages


@pytest.mark.parametrize("code", [
    "import moejax.config", "import moejax", "import moejax; moejax.Config, moejax.load_config, moejax.ConfigError",
    "from moejax.cli import main; main(['--help'])",
    "from moejax.cli import main; sys.exit(main(['train', 'nowhere.py']) != 2)"])
def test_what_needs_no_jax_imports_none(code):
    check = f"import atexit, sys\natexit.register(lambda: print({{'jax', 'numpy'}} & set(sys.modules)))\n{code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_needs_jax_comes_when_it_is_asked_for():
    import moejax

    assert moejax.load.__module__ == "moejax.api"
    with pytest.raises(AttributeError, match="module 'moejax' has no attribute 'nothing'"):
        _ = moejax.nothing

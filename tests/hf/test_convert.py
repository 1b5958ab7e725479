"""Import and export as a user meets them: what is wrong with a checkpoint is said at once, and native runs come out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import moejax
from moejax import config as configs
from moejax.api import export_run, import_folder
from moejax.cli import main
from moejax.config import Config, ConfigError, Data, Model, MoE
from moejax.hf import convert
from moejax.hf.names import FAMILIES, model_of
from moejax.model.sharded import Sharded
from moejax.parallel import mesh as meshes
from moejax.train import checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXACT = 1e-5  # an import sums its experts by another dispatcher, in another order; logits reach 6


@pytest.fixture
def published(tmp_path) -> Callable[..., Path]:
    """published(name, change={key: value or None}): a copy of a fixture, its config.json changed."""

    def make(name: str = "mixtral_gqa", **change: object) -> Path:
        folder = tmp_path / "published"
        folder.mkdir()
        for file in ("model.safetensors", "config.json"):
            shutil.copy(FIXTURES / name / file, folder / file)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | change))
        return folder

    return make


@pytest.fixture
def refused(tmp_path, capfd) -> Callable[..., list[str]]:
    """refused(command, folder, …): what a command that exits with 2 says, by problem; and it has made nothing."""

    def run(command: str, folder: Path, *arguments: str, to: str = "new") -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        assert main([command, str(folder), str(tmp_path / to), *arguments]) == 2
        out, err = capfd.readouterr()
        assert out == "" and sorted(tmp_path.rglob("*")) == before
        head, *lines = err.splitlines()
        assert head == f"moejax {command}: {len(lines)} problem{'s' * (len(lines) > 1)}"
        return [line.removeprefix("  - ").replace(str(folder), "HERE") for line in lines]

    return run


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


# What is wrong with the weights


def test_every_wrong_tensor_is_listed(published, refused):
    def change(values: dict) -> None:
        values.pop("model.norm.weight")
        values["other.weight"] = np.zeros(3, np.float32)
        values["model.embed_tokens.weight"] = values["model.embed_tokens.weight"][:-1]
        values["lm_head.weight"] = values["lm_head.weight"].astype(np.float64)
        values["model.layers.0.input_layernorm.weight"] = np.zeros(64, np.int8)

    folder = published()
    rewrite(folder, change)
    assert refused("import", folder) == [
        "lm_head.weight must be F32, F16, BF16; it is F64, in HERE",
        "model.embed_tokens.weight must have shape [128, 64]; it has [127, 64], in HERE",
        "model.layers.0.input_layernorm.weight must be F32, F16, BF16; it is I8, in HERE",
        "model.norm.weight of shape [64] is missing, in HERE",
        "other.weight is there, and this model has no such tensor, in HERE"]


@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: data[:5], lambda data: data[:200], lambda data: data[:-100],
    lambda data: data + b"more", lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 123\n",
], ids=["empty", "five bytes", "header cut", "data cut", "too long", "a pointer to it"])
def test_a_damaged_file(change, published, refused):
    folder = published()
    damage(folder / "model.safetensors", change)
    problem, = refused("import", folder)
    assert problem.startswith("HERE/model.safetensors is not a whole safetensors file (")
    assert problem.endswith("; fetch it again")
    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        moejax.load(folder)


def test_float8_is_refused_by_name(published, refused):
    folder = published()
    data = (folder / "model.safetensors").read_bytes()
    damage(folder / "model.safetensors", lambda data: data.replace(b'"dtype":"F32"', b'"dtype":"F8_E4M3"'))
    size = int.from_bytes(data[:8], "little") + data.count(b'"dtype":"F32"') * (len("F8_E4M3") - len("F32"))
    damage(folder / "model.safetensors", lambda data: size.to_bytes(8, "little") + data[8:])
    problems = refused("import", folder)
    assert len(problems) == data.count(b'"dtype":"F32"')
    assert problems[0] == "lm_head.weight must be F32, F16, BF16; it is F8_E4M3, in HERE"


def test_no_safetensors(published, refused):
    folder = published()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused("import", folder) == [
        "weights are read from safetensors; HERE has pytorch_model.bin, which are pickle files: reading one can run "
        "any code in it; convert it to safetensors where you trust it"]
    (folder / "pytorch_model.bin").unlink()
    assert refused("import", folder) == [
        "a checkpoint has model.safetensors or model.safetensors.index.json; HERE has neither"]
    assert refused("import", folder / "none") == ["a Hugging Face checkpoint is a folder; HERE is none"]


def split(folder: Path) -> dict[str, str]:
    """The tensors by turns in a.safetensors and b.safetensors."""
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: "ba"[i % 2] + ".safetensors" for i, name in enumerate(sorted(values))}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: values[name] for name in values if where[name] == file}, folder / file)
    (folder / convert.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_an_index_that_lies(published, refused):
    folder = published()
    where = split(folder)
    names = {"x": "c.safetensors", "y": 5, "u": "../published/a.safetensors"}
    (folder / convert.INDEX).write_text(json.dumps({"weight_map": where | names}))
    assert refused("import", folder) == [
        f"HERE/model.safetensors.index.json names the files of the weights beside it; {name} is none; fetch it again"
        for name in ("../published/a.safetensors", "5", "c.safetensors")]


@pytest.mark.parametrize("text", ["{nope", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00", "[" * 9999])
def test_an_index_that_is_none(text, published, refused):
    folder = published()
    split(folder)
    (folder / convert.INDEX).write_text(text)
    problem, = refused("import", folder)
    assert problem.startswith("HERE/model.safetensors.index.json ")


def test_a_tensor_in_two_files(published, refused):
    folder = published()
    split(folder)
    values = load_file(folder / "a.safetensors") | {"lm_head.weight": np.zeros((128, 64), np.float32)}
    save_file(values, folder / "a.safetensors")
    assert refused("import", folder) == ["a tensor lies in one file; lm_head.weight is in HERE/a.safetensors and in "
                                         "HERE/b.safetensors; fetch them again"]


# What is wrong with config.json


@pytest.mark.parametrize("text", ["{", "[]", "3", "", "\x00", "[" * 9999])
def test_a_config_that_is_no_json_object(text, published, refused):
    folder = published()
    (folder / "config.json").write_text(text)
    problem, = refused("import", folder)
    assert problem.startswith("HERE/config.json must be a JSON object; ")
    (folder / "config.json").unlink()
    problem, = refused("import", folder)
    assert problem.startswith("HERE/config.json must be a JSON object; it cannot be read ")


@pytest.mark.parametrize("name", ["gpt2", None, ["mixtral"], 3])
def test_an_unknown_family(name, published, refused):
    problem, = refused("import", published(model_type=name))
    assert problem == ("model_type is one of llama, mistral, mixtral, qwen2_moe, qwen3_moe, olmoe, phimoe, granitemoe, "
                       "gpt_oss, deepseek_v3, clip_vision_model, siglip_vision_model, idefics, clip, siglip; "
                       f"HERE/config.json has {name!r}")


def test_keys_that_must_be_there(published, refused):
    keys = ["num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"]
    problems = refused("import", published(**dict.fromkeys(keys)))
    assert problems == [f"config.json must hold {key}; it does not" for key in keys]


@pytest.mark.parametrize("wrong", ["eight", [1], {"a": 1}, True, -1, 2.5, float("inf"), 10**12], ids=repr)
def test_values_of_the_wrong_kind(wrong, published, refused):
    """A text where a number belongs, and so on: all at once, in the words of config.json."""
    keys = ["num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
            "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "layer_types",
            "tie_word_embeddings", "hidden_act", "max_position_embeddings"]
    keys = [key for key in keys if not (wrong is True and key == "tie_word_embeddings")]
    problems = refused("import", published(**dict.fromkeys(keys, wrong)))
    assert len(problems) == len(keys)
    for key in keys:
        problem, = (text for text in problems if f" {key};" in text or text.startswith(f"{key} can be "))
        assert repr(wrong) in problem and "config.json" in problem


@pytest.mark.parametrize(("name", "change", "problems"), [
    ("llama", {"hidden_act": "gelu"},
     ["hidden_act can be 'silu' or 'swish' or 'gelu_pytorch_tanh' or 'gelu_new' here; config.json has 'gelu'"]),
    ("mistral", {"layer_types": ["full_attention"] * 3},
     ["layer_types can be sliding_attention or full_attention for each layer; config.json has ['full_attention', "
      "'full_attention', 'full_attention']"]),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0]}},
     ["a rotary scaling is linear, dynamic, llama3 or yarn here; config.json has 'longrope'"]),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     ["rotary positions turn whole heads here; config.json has partial_rotary_factor 0.5"]),
    ("llama", {"partial_rotary_factor": 0.5},
     ["rotary positions turn whole heads here; config.json has partial_rotary_factor 0.5"]),
    ("mistral", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
     ["rope_parameters are the same for all layers here; config.json has {'full_attention': {'rope_theta': 1.0}}"]),
    ("llama", {"rope_parameters": {"rope_type": "linear"}},
     ["config.json must hold rope_parameters.factor; it does not"]),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}},
     ["config.json must hold rope_scaling.factor; it does not"]),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": "2", "low_freq_factor": None}},
     ["config.json must hold a number above 0, as rope_parameters.factor; it has '2'",
      "config.json must hold rope_parameters.low_freq_factor; it does not",
      "config.json must hold rope_parameters.high_freq_factor; it does not"]),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "mscale_all_dim": 1.0}},
     ["config.json must hold rope_parameters.factor; it does not"]),
    ("llama", {"rope_parameters": "yarn"}, ["config.json must hold a JSON object, as rope_parameters; it has 'yarn'"]),
    ("deepseek_v3", {"n_group": 3},
     ["model.moe.expert_groups must divide model.moe.experts; got 3 and 8; set model.moe.expert_groups to one of "
      "[1, 2, 4, 8], or model.moe.experts=9"]),
    ("mixtral_gqa", {"quantization_config": {"quant_method": "fp8"}},
     ["weights are float32, float16 or bfloat16; those of HERE are quantised ({'quant_method': 'fp8'}); take a "
      "checkpoint that is not, or dequantise it first"]),
    ("mixtral_gqa", {"quantization_config": "awq"},
     ["weights are float32, float16 or bfloat16; those of HERE are quantised ('awq'); take a checkpoint that is not, "
      "or dequantise it first"]),
])
def test_what_we_cannot_do(name, change, problems, published, refused):
    assert refused("import", published(name, **change)) == problems


# Where it goes


def test_nothing_is_overwritten(published, refused, tmp_path):
    folder = published()
    for name in ("full", "file"):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "mine").write_text("mine")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        for to in (name, "link"):
            for command, rule in (("import", "a checkpoint is imported into a new run folder"),
                                  ("export", "an export is a new folder")):
                assert refused(command, folder, to=to) == [
                    f"{rule}; {tmp_path / to} is there already; name another, or remove it"]


def test_a_place_that_cannot_be_written(published, refused, tmp_path):
    """A file stands where a folder would have to."""
    (tmp_path / "file").write_text("mine")
    for command in ("import", "export"):
        problem, = refused(command, FIXTURES / "llama", to="file/inside")
        assert "file/inside cannot be written (" in problem and problem.endswith("; make room, or name another")


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_disk_that_fills_up_leaves_nothing(command, refused, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moejax.api, "write_weights", full)
    monkeypatch.setattr(convert, "write", full)
    problem, = refused(command, FIXTURES / "llama")
    assert problem.endswith("cannot be written ([Errno 28] No space left on device); make room, or name another")


def test_a_mesh_that_does_not_divide(refused):
    problems = refused("import", FIXTURES / "mixtral_gqa", "mesh.expert=3", "mesh.tensor=5")
    assert "mesh.expert must divide model.moe.experts; got 3 and 8; set mesh.expert to one of [1, 2, 4, 8], or " \
           "model.moe.experts=9" in problems and len(problems) == 5
    problem, = refused("import", FIXTURES / "mixtral_gqa", "mesh.expert=8", "mesh.data=4")
    assert problem.startswith("the mesh axes must multiply to the number of devices; got data 4 ")
    problem, = refused("import", FIXTURES / "mixtral_gqa", "run_dir=other")
    assert problem.startswith("the run folder of an import is named once; got ")
    assert len(refused("import", FIXTURES / "mixtral_gqa", "model.layerz=3", "mesh.data=x")) == 2


def test_checkpoints_of_another_run(run, refused):
    """They would be taken for the imported weights."""
    folder = run / "checkpoints"
    assert refused("import", FIXTURES / "llama", f"checkpoint.folder={folder}") == [
        f"an import writes the first checkpoint of a run; {folder} holds some already; set "
        "checkpoint.folder to another"]


# There and back


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An imported run of Mixtral."""
    import_folder(FIXTURES / "mixtral_gqa", tmp_path_factory.mktemp("imported") / "run")
    return tmp_path_factory.getbasetemp() / "imported0" / "run"


def test_one_json_object_on_stdout(tmp_path, capfd):
    assert main(["import", str(FIXTURES / "llama"), str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "run_dir": str(tmp_path / "run"), "family": "llama", "parameters": 84_288}
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "folder": str(tmp_path / "out"), "family": "llama", "tensors": 21, "bytes": 84_288 * 4}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_export_in_another_dtype(run, dtype, kind, tmp_path, capfd):
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    before, after = (load_file(folder / "model.safetensors") for folder in (FIXTURES / "mixtral_gqa", tmp_path / "out"))
    assert {name: (value.dtype, value.tobytes()) for name, value in after.items()} == {
        name: (np.dtype(kind), value.astype(kind).tobytes()) for name, value in before.items()}
    import_folder(tmp_path / "out", tmp_path / "again")  # which stays in that dtype
    export_run(tmp_path / "again", tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_dtypes_that_do_not_fit(run, published, refused, tmp_path):
    assert refused("export", run, "--dtype", "int8") == [
        "an export is float32, float16, bfloat16; got dtype 'int8'"]
    folder = published("llama")
    rewrite(folder, lambda values: values["model.norm.weight"].__setitem__(3, -70_000))
    assert refused("export", folder, "--dtype", "float16") == [
        "float16 holds numbers below 65520; norm.scale goes up to 70000; export as bfloat16 or float32"]


def test_an_export_of_many_files(run, tmp_path, monkeypatch, tensors):
    monkeypatch.setattr(convert, "SHARD", 100_000)
    result = export_run(run, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(
        len(files))] and len(files) > 4
    index = json.loads((tmp_path / "out" / convert.INDEX).read_text())
    assert index["metadata"]["total_size"] == result["bytes"]
    for path in files:
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(name for name, at in index["weight_map"].items() if at == path.name)
    assert tensors(tmp_path / "out") == tensors(FIXTURES / "mixtral_gqa")
    assert moejax.load(tmp_path / "out").config.model == moejax.load(run).config.model


@pytest.mark.parametrize("name", ["mixtral_gqa", "deepseek_v3", "granitemoe"])
def test_a_mesh_changes_no_bit(name, tmp_path):
    import_folder(FIXTURES / name, tmp_path / "run", ["mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=2"])
    assert len(moejax.load(tmp_path / "run").weights["embedding"].sharding.device_set) == 8
    export_run(tmp_path / "run", tmp_path / "out")
    expected, got = (load_file(folder / "model.safetensors") for folder in (FIXTURES / name, tmp_path / "out"))
    assert {key: value.tobytes() for key, value in got.items()} == {
        key: value.tobytes() for key, value in expected.items()}


def test_a_checkpoint_is_exported_without_a_run(tmp_path):
    """Its config.json stays as it is."""
    export_run(FIXTURES / "llama_yarn", tmp_path / "out")
    old, new = ((folder / "config.json").read_text() for folder in (FIXTURES / "llama_yarn", tmp_path / "out"))
    assert json.loads(new) == json.loads(old)


def test_a_changed_model_is_exported_as_it_is(tmp_path):
    """Not with the config.json that it came with."""
    import_folder(FIXTURES / "llama", tmp_path / "run", ["model.norm_eps=0.5"])
    export_run(tmp_path / "run", tmp_path / "out")
    assert moejax.load(tmp_path / "out").config.model.norm_eps == 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 0.5


def test_an_origin_that_was_damaged(run, refused, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for text in ("{", "[]", "{}", '{"config": 3, "dtypes": {}}', '{"config": {"model_type": "x"}, "dtypes": {}}'):
        (tmp_path / "run" / convert.ORIGIN).write_text(text)
        problem, = refused("export", tmp_path / "run")
        assert problem.startswith(f"HERE/{convert.ORIGIN} ")


# Native runs

BASE = Model(layers=2, pattern="D", d_model=16, heads=4, kv_heads=2, head_dim=4, hidden=24, vocab=32)
MOE = MoE(experts=4, active=2, hidden=12, capacity_factor=None)
NATIVE = {
    "dense": (BASE, "llama"),
    "tied, biases": (replace(BASE, tied=True, activation="geglu", biases=("qkv", "output", "mlp")), "llama"),
    "yarn": (replace(BASE, rope_scaling="yarn factor=4 original=8 fast=3 slow=2 attention=1.5 truncate=0"), "llama"),
    "yarn as usual": (replace(BASE, rope_scaling="yarn factor=4 original=8"), "llama"),
    "dynamic": (replace(BASE, rope_scaling="dynamic factor=4 original=8"), "llama"),
    "llama3": (replace(BASE, rope_scaling="llama3 factor=4 low=1 high=4 original=8"), "llama"),
    "windows": (replace(BASE, pattern="dD", window=5), "mistral"),
    "experts": (replace(BASE, pattern="m", window=5, moe=MOE), "mixtral"),
    "softmax after the choice": (replace(BASE, pattern="M", moe=replace(MOE, softmax="after")), "mixtral"),
    "capacity of training": (replace(BASE, pattern="M", moe=replace(
        MOE, group=4, jitter=0.1, capacity_factor=0.5, priority="score")), "mixtral"),
    "shared expert": (replace(BASE, pattern="DM", biases=("qkv",), moe=replace(
        MOE, shared=20, shared_gate=True, renormalise=False)), "qwen2_moe"),
    "head norms": (replace(BASE, pattern="MD", qk_norm="head", moe=MOE), "qwen3_moe"),
    "whole norms": (replace(BASE, pattern="M", qk_norm="all", qkv_limit=0.5, moe=replace(
        MOE, renormalise=False)), "olmoe"),
    "sparsemixer": (replace(BASE, pattern="M", norm="layernorm", biases=("norm", "qkv", "output", "head"), moe=replace(
        MOE, router="sparsemixer")), "phimoe"),
    "multipliers": (replace(BASE, pattern="M", multipliers=(2.0, 0.5, 0.3, 0.25), moe=MOE), "granitemoe"),
    "clamped, sinks": (replace(
        BASE, pattern="mM", window=5, activation="clamped_swiglu", clamp=(1.5, 2.0), biases=(
            "qkv", "output", "sinks", "experts", "router"), moe=replace(MOE, softmax="after")), "gpt_oss"),
    "latent, sigmoid": (replace(
        BASE, layers=2, pattern="DM", kv_heads=4, head_dim=10, latent=(12, 14, 4, 6), moe=replace(
            MOE, router="sigmoid", shared=24, scale=2.5, expert_groups=2, active_groups=1)), "deepseek_v3"),
    "latent, whole queries": (replace(BASE, pattern="D", kv_heads=4, head_dim=10, latent=(0, 14, 4, 6)), "deepseek_v3"),
}


def native(folder: Path, model: Model) -> Path:
    """A run folder with random weights, so that none of them may be lost."""
    config = Config(run_dir=str(folder), model=model, data=Data(sequence=16, batch=1, tokenizer=""))
    assert configs.check(config) == []
    sharded, draw = Sharded(config, meshes.make_mesh(config.mesh, jax.devices()[:1])), np.random.default_rng(0)
    weights = {name: jax.device_put(draw.normal(0.0, 0.5, shape).astype(np.float32), sharded.shardings[name])
               for name, shape in sharded.shapes.items()}
    if model.moe.router != "sigmoid":  # others balance without the bias, which stays 0
        weights |= {name: jax.numpy.zeros_like(value) for name, value in weights.items() if name.endswith("feed.bias")}
    folder.mkdir(parents=True)
    checkpoint.write_weights(config, weights)
    (folder / "config.json").write_text(configs.to_json(config))
    return folder


TOKENS = np.random.default_rng(1).integers(0, 32, (2, 8))


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_run_is_exported(name, tmp_path):
    model, family = NATIVE[name]
    folder = native(tmp_path / "run", model)
    assert export_run(folder, tmp_path / "out")["family"] == family
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["dtype"] == "float32" and settings["model_type"] == family
    if model.latent:
        assert settings["head_dim"] == settings["qk_rope_head_dim"]  # what transformers turns
    before, after = moejax.load(folder), moejax.load(tmp_path / "out")
    assert before.weights.keys() == after.weights.keys()
    for weight, value in before.weights.items():
        np.testing.assert_array_equal(value, after.weights[weight])
    np.testing.assert_allclose(after(TOKENS).logits, before(TOKENS).logits, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("model", "what"), [
    (replace(BASE, activation="gelu"), "model.activation='gelu' (it has 'swiglu')"),
    (replace(BASE, caps=(50.0, 30.0)), "model.caps=(50.0, 30.0) (it has ())"),
    (replace(BASE, pattern="M", moe=replace(MOE, router="expert_choice", capacity_factor=1.0)),
     "model.moe.router='expert_choice' (it has 'topk')"),
    (replace(BASE, pattern="M", norm="layernorm", moe=MOE), "model.norm='layernorm' (it has 'rmsnorm')"),
])
def test_what_no_family_can_express(model, what, tmp_path, refused):
    problems = refused("export", native(tmp_path / "run", model))
    assert len(problems) == 1 and f"cannot express {what}; train a model without it" in problems[0]


def test_a_run_without_a_checkpoint(tmp_path, refused):
    folder = native(tmp_path / "run", BASE)
    shutil.rmtree(folder / "checkpoints")
    assert refused("export", folder) == ["a run folder holds checkpoints; HERE has none; train it first"]
    (folder / "config.json").write_text("{")
    problem, = refused("export", folder)
    assert problem.startswith("HERE/config.json must be a JSON object; ")
    (folder / "config.json").unlink()
    assert refused("export", folder) == ["a run folder holds a config.json; HERE has none; train it first"]


# A run that begins with imported weights


def test_training_begins_with_the_imported_weights(tmp_path, capfd):
    """And goes on from its own; the steps are too small to change a bit."""
    export_run(native(tmp_path / "native", replace(BASE, vocab=264)), tmp_path / "published")
    run = tmp_path / "imported"
    import_folder(tmp_path / "published", run, ["mesh.data=8", "data.tokenizer=bytes"])
    (tmp_path / "text.txt").write_text("Here is some text. " * 40)
    command = ["train", str(run / "config.json"), "data.sequence=16", "data.batch=8", "data.validation=0",
               f"data.sources={tmp_path / 'text.txt'}", f"data.cache={tmp_path}", "optimizer.lr=1e-30",
               "optimizer.weight_decay=0"]
    for steps in (1, 2):
        assert main([*command, f"train.init={run}", f"run_dir={tmp_path / 'new'}", f"train.steps={steps}"]) == 0
        expected, got = moejax.load(run).weights, moejax.load(tmp_path / "new").weights
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value)
    assert "resumed after step 1" in capfd.readouterr().err
    fresh = tmp_path / "other"
    for init, change, message in (
            (run, "model.layers=3", "a run begins with weights of a model like its own; "),
            (tmp_path / "none", "train.steps=1", f"{tmp_path / 'none'} holds no config.json"),
            (tmp_path / "published", "train.steps=1", f"moejax import {tmp_path / 'published'} RUN")):
        assert main([*command, f"train.init={init}", f"run_dir={fresh}", change]) == 2
        assert message in capfd.readouterr().err
        assert not (fresh / "config.json").exists()  # so that the same command can be repaired
    assert main([*command, f"train.init={run}", f"run_dir={fresh}", "train.steps=1", "model.norm_eps=1e-4"]) == 0
    assert f"this model is not that of {run}: model.norm_eps" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "key", "found"), [
    ("mistral", "sliding_window", lambda model: model.window == 4096),
    ("mixtral_gqa", "rms_norm_eps", lambda model: model.norm_eps == 1e-5),
    ("mixtral_gqa", "rope_parameters", lambda model: model.rope_theta == 1e6),
    ("gpt_oss", "head_dim", lambda model: model.head_dim == 64),
    ("llama", "num_key_value_heads", lambda model: model.kv_heads == model.heads)])
def test_what_a_config_leaves_out_is_as_its_family_has_it(name, key, found):
    """The defaults of transformers 5.23, by class."""
    published = json.loads((FIXTURES / name / "config.json").read_text())
    del published[key]
    family = FAMILIES[published["model_type"]]
    assert found(model_of(family, family.reader(published)))

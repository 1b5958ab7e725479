"""Generation: cached as uncached, the same on every mesh and with every dispatcher, and it stops where it should."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from moejax.config import Config, ConfigError, Data, Mesh, Model, MoE
from moejax.model.sharded import Sharded
from moejax.parallel.mesh import make_mesh
from moejax.serve.generate import BUCKET, generate_tokens

NEW = 7
# Without its "nothing is dropped in generation" each of the two would drop most tokens, in training and evaluation.
SMALL = MoE(experts=4, active=2, hidden=16, group=4, capacity_factor=0.5, eval_capacity_factor=0.5)
MODELS = {
    "MQA, topk": Model(layers=2, d_model=16, heads=4, kv_heads=1, head_dim=4, vocab=264, moe=SMALL),
    "GQA, dense and sparse layers, sigmoid, shared expert": Model(
        layers=4, pattern="DM", d_model=16, heads=4, kv_heads=2, head_dim=4, hidden=24, vocab=264, norm="layernorm",
        activation="gelu", tied=True, moe=replace(SMALL, router="sigmoid", shared=16, scale=2.0))}
MQA, GQA = MODELS
LENGTHS = {MQA: (1, 5, BUCKET, 17, 2), GQA: (BUCKET + 1, 3, 40)}
ALL = Mesh(data=2, expert=2, tensor=2)


@cache
def on(model: str, mesh: Mesh | None = None, **moe) -> Sharded:
    mesh = mesh or Mesh()
    changed = replace(MODELS[model], moe=replace(MODELS[model].moe, **moe))
    config = Config(name="x", run_dir="x", model=changed, mesh=mesh, data=Data(sequence=32, batch=8))
    return Sharded(config, make_mesh(mesh, jax.devices()[: mesh.devices()]))


@cache
def weights_of(model: str) -> dict[str, np.ndarray]:
    """Three times as large as fresh ones, so that tokens vary, with biases that decide the choice of experts."""
    random = np.random.default_rng(0)
    made = {name: 3 * value for name, value in jax.device_get(on(model).init(0)).items()}
    return {name: random.normal(size=value.shape).astype(np.float32) if name.endswith("bias") else value
            for name, value in made.items()}


def prompts_of(model: str) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, length).tolist() for length in LENGTHS[model]]


def generate(model: str, sharded: Sharded, prompts=None, **options) -> list[list[int]]:
    weights = jax.device_put(weights_of(model), sharded.shardings)
    return generate_tokens(sharded, weights, prompts or prompts_of(model), NEW, **options)


@cache
def greedy(model: str) -> list[list[int]]:
    return generate(model, on(model))


@cache
def sampled(model: str) -> list[list[int]]:
    return generate(model, on(model), temperature=1.0, top_p=0.9, seed=3)


@pytest.mark.parametrize("model", MODELS)
def test_cached_is_uncached(model):
    """Each new token is the likeliest after all before it, in one dropless forward pass over the whole."""
    prompts, new = prompts_of(model), greedy(model)
    assert [len(row) for row in new] == [NEW] * len(prompts)
    assert len({token for row in new for token in row}) > NEW  # no model that says one thing
    rows = np.zeros((len(prompts), max(map(len, prompts)) + NEW), np.int32)
    for row, prompt, tokens in zip(rows, prompts, new, strict=True):
        row[: len(prompt) + NEW] = prompt + tokens
    output = on(model, group=None, eval_capacity_factor=None).forward(weights_of(model), rows)
    best = np.argmax(output.logits, -1)
    for row, prompt, tokens in zip(best, prompts, new, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + NEW - 1].tolist() == tokens
    # with the evaluation's capacity that would not be so
    assert not bool(np.all(on(model).forward(weights_of(model), rows[:, :32]).routing.kept))


@pytest.mark.parametrize("model, mesh, dispatcher", [
    (MQA, ALL, "sorted"), (MQA, ALL, "blocked"), (MQA, ALL, "einsum"), (MQA, Mesh(tensor=4), "sorted"),
    (MQA, Mesh(fsdp=2), "sorted"), (GQA, ALL, "blocked")],
    ids=["MQA-all", "MQA-all-blocked", "MQA-all-einsum", "MQA-tensor 4", "MQA-fsdp 2", "GQA-all-blocked"])
def test_every_mesh_and_dispatcher_gives_the_same_tokens(model, mesh, dispatcher):
    """5 and 3 prompts do not divide by the 4 shards of the batch."""
    sharded = on(model, mesh, dispatcher=dispatcher)
    assert generate(model, sharded) == greedy(model)
    assert generate(model, sharded, temperature=1.0, top_p=0.9, seed=3) == sampled(model)


def test_sampled_tokens_follow_the_seed_and_the_row():
    assert sampled(MQA) != greedy(MQA)
    assert generate(MQA, on(MQA), temperature=1.0, top_p=0.9, seed=3) == sampled(MQA)
    assert generate(MQA, on(MQA), temperature=1.0, top_p=0.9, seed=4) != sampled(MQA)
    same = generate(MQA, on(MQA), [[65, 66]] * 5, temperature=1.0)
    assert len(set(map(tuple, same))) == 5
    assert generate(MQA, on(MQA), temperature=1.0, top_p=1e-6) == greedy(MQA)


@pytest.mark.parametrize("sharded", [on(MQA), on(MQA, ALL, dispatcher="sorted")], ids=["one", "mesh"])
def test_it_stops_after_the_end(sharded):
    rows = greedy(MQA)
    for end in {rows[0][2], rows[1][0], rows[2][-1], 263}:
        expected = [row[: row.index(end) + 1] if end in row else row for row in rows]
        assert generate(MQA, sharded, ends=[end]) == expected
    assert any(len(row) < NEW for row in generate(MQA, sharded, ends=[rows[0][2]]))
    both = rows[0][2], rows[1][1]
    assert generate(MQA, sharded, ends=both) == [
        row[: 1 + min((row.index(end) for end in both if end in row), default=NEW)] for row in rows]


def test_a_prompt_does_not_know_the_others():
    """However the batch is padded; on one device, where the number of rows is the number of prompts."""
    prompts = prompts_of(MQA)
    assert generate(MQA, on(MQA), [prompts[2], [9], prompts[0], prompts[4], prompts[1]]) == [
        greedy(MQA)[2], generate(MQA, on(MQA), [[9]] * 5)[0], greedy(MQA)[0], greedy(MQA)[4], greedy(MQA)[1]]


def problems_of(sharded: Sharded, *arguments, **options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        generate_tokens(sharded, {}, *arguments, **options)
    return error.value.problems


def test_what_cannot_be_generated():
    empty = "a prompt has at least one token; got an empty one"
    assert problems_of(on(MQA), [[1], []], 1) == [empty]
    assert problems_of(on(MQA), [], 1) == [empty]
    assert problems_of(on(MQA), [[]], 0, temperature=-1.0, top_p=0.0) == [
        empty, "max_new_tokens must be 1 or more; got 0",
        "temperature must not be negative; got -1.0; 0 takes the likeliest token",
        "top_p must be above 0 and at most 1; got 0.0"]
    for top_p in (1.5, float("nan")):
        assert problems_of(on(MQA), [[1]], 1, top_p=top_p) == [f"top_p must be above 0 and at most 1; got {top_p}"]
    (found,) = problems_of(on(MQA), [[1]], 1, temperature=float("nan"))
    assert found.startswith("temperature must not be negative; got nan")
    (found,) = problems_of(on(MQA, router="expert_choice"), [[1]], 1)
    assert found.startswith("generation needs a router that does not look ahead; this model's is expert_choice")

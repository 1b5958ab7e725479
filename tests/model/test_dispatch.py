"""Three dispatchers against each other and against a loop over tokens, forward and backward.

BLOCKS are made small, so that a few tokens fill several blocks and end inside one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import dispatch, router
from moejax.model.dispatch import DISPATCHERS, Experts
from moejax.model.layers import ACTIVATIONS
from moejax.parallel import collectives
from moejax.parallel.mesh import make_mesh

R, M, D, E, F = 4, 13, 7, 4, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "BLOCKS", (8, 3))


decide = jax.jit(lambda logits, moe, seats: router.route(logits, jnp.zeros(E), moe, seats)[0], static_argnums=(1, 2))


def route(moe: configs.MoE, seats: int, lean=0.0, seed: int = 0):
    """A routing of random logits as numpy; `lean` is added to those of each expert."""
    logits = np.random.default_rng(seed).normal(size=(R, M, E)).astype(np.float32) + np.asarray(lean, np.float32)
    return jax.device_get(decide(logits, moe, seats))


def values(seed: int = 0):
    """(x, up, down, a gradient of the output), sized to give outputs around 1."""
    random = np.random.default_rng(seed)
    shapes = ((R, M, D), (E, D, 2, F), (E, F, D), (R, M, D))
    scales = (1, D**-0.5, F**-0.5, 1)
    return [(random.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(shapes, scales, strict=True)]


def biases(seed: int = 0):
    """Of what goes in, and of what comes out."""
    random = np.random.default_rng(seed + 100)
    return [random.normal(size=shape).astype(np.float32) for shape in ((E, 2, F), (E, D))]


def loop(x, up, down, upstream, routing, *biases):
    """Output and gradients in x, up, down, the combine weights and the biases of swiglu experts; one token after
    another.
    """
    x, up, down, upstream = (v.astype(np.float64) for v in (x, up, down, upstream))
    y, dx, dup, ddown = (np.zeros_like(v) for v in (x, x, up, down))
    bias = biases or (np.zeros((E, 2, F)), np.zeros((E, D)))
    dbias = tuple(np.zeros(v.shape) for v in bias)
    dweight = np.zeros(routing.weight.shape)
    for r, m, a in zip(*np.nonzero(routing.kept), strict=True):
        e, w, dy = routing.expert[r, m, a], float(routing.weight[r, m, a]), upstream[r, m]
        gate, value = x[r, m] @ up[e, :, 0] + bias[0][e, 0], x[r, m] @ up[e, :, 1] + bias[0][e, 1]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * value
        out = hidden @ down[e] + bias[1][e]
        y[r, m] += w * out
        dweight[r, m, a] = out @ dy
        ddown[e] += w * np.outer(hidden, dy)
        dhidden = w * down[e] @ dy
        dgate = dhidden * value * (sigmoid + gate * sigmoid * (1 - sigmoid))
        dvalue = dhidden * gate * sigmoid
        dup[e] += np.stack([np.outer(x[r, m], dgate), np.outer(x[r, m], dvalue)], 1)
        dx[r, m] += up[e, :, 0] @ dgate + up[e, :, 1] @ dvalue
        dbias[0][e] += np.stack([dgate, dvalue])
        dbias[1][e] += w * dy
    return y, dx, dup, ddown, dweight, *(dbias if biases else ())


ONE = configs.Mesh()


@functools.cache
def compiled(name: str, seats: int, mesh: configs.Mesh = ONE, blocks: tuple[int, ...] = (8, 3)):
    """What `loop` returns, of a dispatcher on a mesh, jitted; the tensor shards' parts are summed as in the model."""
    def run(x, up, down, upstream, routing, *biases):
        def device(x, up, down, weight, biases, expert, slot, kept):
            shares = (biases[0], collectives.once(biases[1])) if biases else None
            parts = DISPATCHERS[name](collectives.enter(x, False), router.Routing(expert, weight, slot, kept), seats,
                                      Experts(up, down, ACTIVATIONS["swiglu"], shares))
            return collectives.leave(parts, False)

        def many(x, up, down, weight, *biases):
            return jax.shard_map(
                device, mesh=devices, in_specs=(rows, *weights, rows, places[:len(biases)], rows, rows, rows),
                out_specs=rows)(x, up, down, weight, biases, routing.expert, routing.slot, routing.kept)

        y, back = jax.vjp(many, x, up, down, routing.weight, *biases)
        return y, *back(upstream)

    devices = make_mesh(mesh, jax.devices()[: mesh.devices()])
    expert, tensor = ("expert" if mesh.expert > 1 else None), ("tensor" if mesh.tensor > 1 else None)
    rows, weights = P(expert), (P(expert, None, None, tensor), P(expert, tensor, None))
    places = P(expert, None, tensor), P(expert)
    return jax.jit(run)


def test_gate_and_up_are_kept_apart():
    """Reading both from one stack of layers would take the way back thrice as long on CPUs."""
    experts = Experts(jnp.ones((E, D, 2, F)), jnp.ones((E, F, D)), ACTIVATIONS["swiglu"])
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(experts, jnp.ones((E, M, D)))[1])]
    assert kept.count((E, M, F)) == 2 and (E, M, 2, F) not in kept and (E, M, 2 * F) not in kept


PARTS = ("output", "x", "up", "down", "combine weights", "bias of up", "bias of down")


def compare(got, want, tolerance: float = 1e-5):
    """float32 sums of at most 50 terms; each part's norm of the difference over its norm."""
    for part, g, w in zip(PARTS[:len(want)], got, want, strict=True):
        gap = np.linalg.norm(np.asarray(g, np.float64) - w) / max(np.linalg.norm(w), 1e-30)
        assert gap < tolerance, (part, gap)


CASES = {  # the routing, seats and what leans on the experts
    "top 1": (configs.MoE(experts=E, active=1, renormalise=False), M, 0),
    "top 2 with drops": (configs.MoE(experts=E, active=2, capacity_factor=0.6), 4, 0),  # ceil(13 × 2 / 4 × 0.6)
    "top 2 dropless": (configs.MoE(experts=E, active=2), M, 0),
    "top 3 with drops": (configs.MoE(experts=E, active=3, capacity_factor=0.6), 6, 0),
    "expert choice": (configs.MoE(experts=E, active=2, router="expert_choice"), 7, 0),
    "experts 0 and 2 get nothing": (configs.MoE(experts=E, active=2), M, [-99, 0, -99, 0]),
    "the last expert gets nothing": (configs.MoE(experts=E, active=2), M, [0, 0, 0, -99]),
    "expert 1 gets everything": (configs.MoE(experts=E, active=1, renormalise=False), M, [0, 99, 0, 0]),
    "expert 3 gets more than it holds": (configs.MoE(experts=E, active=2, capacity_factor=0.6), 4, [0, 0, 0, 99]),
}


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("case", CASES)
def test_a_dispatcher_is_the_loop_over_tokens(case: str, name: str):
    moe, seats, lean = CASES[case]
    routing, inputs = route(moe, seats, lean), values()
    assert ("drops" in case or "more" in case) == bool(np.any(~routing.kept) and moe.router == "topk")
    compare(compiled(name, seats)(*inputs, routing), loop(*inputs, routing))


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("mesh", [configs.Mesh(expert=4), configs.Mesh(expert=2, tensor=2)])
def test_on_a_mesh_a_dispatcher_is_the_loop_too(name: str, mesh: configs.Mesh):
    inputs = values(1)
    for case in ("top 2 with drops", "expert 3 gets more than it holds"):
        moe, seats, lean = CASES[case]
        routing = route(moe, seats, lean, seed=1)
        compare(compiled(name, seats, mesh)(*inputs, routing), loop(*inputs, routing))


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("mesh", [configs.Mesh(), configs.Mesh(expert=4), configs.Mesh(expert=2, tensor=2)])
def test_experts_with_biases_are_the_loop_on_every_mesh(name: str, mesh: configs.Mesh):
    """An expert without tokens has no gradient in its biases, though its empty seats give what the biases make."""
    for case in ("top 2 with drops", "experts 0 and 2 get nothing"):
        moe, seats, lean = CASES[case]
        routing, inputs = route(moe, seats, lean, seed=1), values(1)
        got = compiled(name, seats, mesh)(*inputs, routing, *biases())
        compare(got, loop(*inputs, routing, *biases()))
        if case.startswith("experts"):
            assert not any(np.any(np.asarray(g)[[0, 2]]) for g in got[-2:])


@pytest.mark.parametrize("load", [[8, 16, 0, 28], [1, 0, 50, 1], [7, 9, 17, 19], [0, 0, 0, 52], [52, 0, 0, 0]])
def test_blocks_that_end_early_or_on_the_edge(load: list[int]):
    """52 tokens in blocks of 8 and 3: full, tails that reach into the next expert's rows, and past the last row."""
    expert = np.random.default_rng(3).permutation(np.repeat(np.arange(E, dtype=np.int32), load)).reshape(R, M, 1)
    slot = np.stack([[row[:i].count(e) for i, e in enumerate(row)] for row in expert[..., 0].tolist()])
    routing = router.Routing(expert, np.full((R, M, 1), .5, np.float32), slot[..., None].astype(np.int32),
                             np.ones((R, M, 1), bool))
    inputs = values(3)
    compare(compiled("blocked", M)(*inputs, routing, *biases()), loop(*inputs, routing, *biases()))


def test_blocks_of_the_size_that_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert min(dispatch.BLOCKS) > R * M  # one block for each expert, mostly tail
    routing, inputs = route(*CASES["top 2 dropless"][:2]), values()
    compare(compiled("blocked", M, blocks=dispatch.BLOCKS)(*inputs, routing), loop(*inputs, routing))


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_token_without_a_seat_leaves_no_trace(name: str):
    """Empty seats and block tails hold rows of the last token; nothing may come of them."""
    routing, inputs = route(configs.MoE(experts=E, active=1), 3, [0, 0, 0, 99]), values()
    assert not routing.kept[:, 3:].any()  # experts 0 to 2 have empty seats only, 12 rows end inside a block of 8
    other = [v.copy() for v in inputs]
    other[0][:, 3:] = 1e3
    other[3][:, 3:] = 1e3
    before, after = (compiled(name, 3)(*given, routing, *biases()) for given in (inputs, other))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not np.any(np.asarray(after[0])[:, 3:]) and not np.any(np.asarray(after[1])[:, 3:])


def test_blocked_reads_no_expert_that_gets_nothing():
    moe, seats, lean = CASES["experts 0 and 2 get nothing"]
    routing, (x, up, down, upstream) = route(moe, seats, lean), values()
    want = loop(x, up, down, upstream, routing)
    up[[0, 2]] = down[[0, 2]] = np.nan
    compare(compiled("blocked", seats)(x, up, down, upstream, routing), want)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_bfloat16(name: str):
    """A bfloat16 keeps 8 bits: each rounding is at most 2^-9 = 0.2 % of a number.  On the way out a number is rounded
    as matmul, activation, matmul and sum, on the way back once more as often: under 1 % of the norm; in fact 0.5 %.
    """
    moe, seats, lean = CASES["top 2 with drops"]
    routing, inputs = route(moe, seats, lean), [jnp.asarray(v, jnp.bfloat16) for v in values()]
    got = compiled(name, seats)(*inputs, routing)
    assert [str(v.dtype) for v in got] == ["bfloat16"] * 4 + ["float32"]
    exact = [np.asarray(v, np.float32) for v in inputs]
    compare([np.asarray(v, np.float32) for v in got], loop(*exact, routing), 1e-2)


def test_gather_dispatch_adds_no_scatter_of_rows():
    """Scatter-adds of rows are slow on every backend; autodiff would make them of the gathers."""
    moe, seats, lean = CASES["top 2 with drops"]
    inputs, routing = values(), route(moe, seats, lean)
    for name in ("sorted", "blocked"):
        text = compiled(name, seats).lower(*inputs, routing).as_text()
        assert "stablehlo.gather" in text
        rows = [line for line in text.splitlines() if "stablehlo.scatter" in line and f"x{D}xf32" in line]
        assert not rows

"""Routers against decisions worked out by hand, and against a layer of transformers' Switch.

Logits are logarithms of probabilities, so that the softmax gives those probabilities back.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import config as configs
from moejax.model import router
from moejax.model.dispatch import DISPATCHERS, Experts
from moejax.parallel import collectives

SWITCH = Path(__file__).parents[1] / "fixtures" / "switch"


route = jax.jit(router.route, static_argnums=(2, 3))


def decide(logits, moe: configs.MoE, seats: int, bias=None):
    """(routing, losses) as numpy; logits [M E] are one group."""
    logits = np.asarray(logits, np.float32)
    logits = logits.reshape(-1, *logits.shape[-2:])
    bias = np.zeros(moe.experts) if bias is None else np.asarray(bias)
    found = route(logits, np.asarray(bias, np.float32), moe, seats)
    return jax.tree.map(np.asarray, found)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)  # one rounding of float32 or two


# Switch: 5 tokens, 3 experts, seats = ceil(5 / 3 × 1.0) = 2.
FIVE = np.array([[.6, .3, .1], [.5, .2, .3], [.1, .8, .1], [.7, .2, .1], [.2, .1, .7]])
ONE_OF_3 = configs.MoE(experts=3, active=1, renormalise=False, capacity_factor=1.0)


def test_top_1_is_switch():
    assert router.capacity(ONE_OF_3, 5, True) == 2
    routing, _ = decide(np.log(FIVE), ONE_OF_3, 2)
    assert routing.expert[0, :, 0].tolist() == [0, 0, 1, 0, 2]
    close(routing.weight[0, :, 0], [.6, .5, .8, .7, .7])  # the probability of the expert, not 1
    assert routing.slot[0, :, 0].tolist() == [0, 1, 0, 2, 0]  # token 3 is the third for expert 0
    assert routing.kept[0, :, 0].tolist() == [True, True, True, False, True]  # and finds 2 seats taken


def test_switch_losses_by_hand():
    # Token t's logits are shifted by t, which changes no probability; its logsumexp is log(1) + t.
    _, losses = decide(np.log(FIVE) + np.arange(5)[:, None], ONE_OF_3, 2)
    assert losses.load.tolist() == [3, 1, 1]  # before capacity
    assert losses.dropped == 1
    # f = [3, 1, 1] / 5; P = [.6+.5+.1+.7+.2, .3+.2+.8+.2+.1, .1+.3+.1+.1+.7] / 5 = [.42, .32, .26]
    # 3 × (.6 × .42 + .2 × .32 + .2 × .26) = 3 × .368
    close(losses.balance, 1.104)
    close(losses.z, (0 + 1 + 4 + 9 + 16) / 5)


def test_renormalised_top_1_always_weighs_one():
    routing, _ = decide(np.log(FIVE), configs.MoE(experts=3, active=1, renormalise=True), 5)
    close(routing.weight, 1)


FOUR = np.array([[.5, .3, .15, .05], [.1, .2, .3, .4], [.02, .6, .08, .3]])


@pytest.mark.parametrize(("moe", "weights"), [
    (configs.MoE(renormalise=False), [[.5, .3], [.4, .3], [.6, .3]]),
    (configs.MoE(renormalise=False, scale=2.5), [[1.25, .75], [1., .75], [1.5, .75]]),
    # .5 / (.5 + .3), .4 / (.4 + .3), .6 / (.6 + .3)
    (configs.MoE(renormalise=True), [[5 / 8, 3 / 8], [4 / 7, 3 / 7], [2 / 3, 1 / 3]]),
    (configs.MoE(renormalise=True, scale=2.0), [[5 / 4, 3 / 4], [8 / 7, 6 / 7], [4 / 3, 2 / 3]]),
    # e^log .5 / (e^log .5 + e^log .3) is the same, whatever renormalise says
    (configs.MoE(softmax="after", renormalise=False), [[5 / 8, 3 / 8], [4 / 7, 3 / 7], [2 / 3, 1 / 3]]),
    (configs.MoE(softmax="after", scale=3.0), [[15 / 8, 9 / 8], [12 / 7, 9 / 7], [2, 1]]),
])
def test_top_2_softmax_before_and_after_the_choice(moe: configs.MoE, weights: list):
    moe = configs.dataclasses.replace(moe, experts=4, active=2)
    routing, losses = decide(np.log(FOUR) + 1, moe, 3)
    assert routing.expert[0].tolist() == [[0, 1], [3, 2], [1, 3]]
    close(routing.weight[0], weights)
    # The balance loss takes the softmax over all experts: f = [1, 2, 1, 2] / 6,
    # P = [.62, 1.1, .53, .75] / 3; 4 × (.62 + 2.2 + .53 + 1.5) / 18 = 4 × 4.85 / 18
    close(losses.balance, 4 * 4.85 / 18)
    close(losses.z, 1.0)


# First and second choices: token 0: 0, 1; token 1: 1, 0; token 2: 0, 2.
THREE = np.array([[.6, .3, .1], [.3, .5, .2], [.7, .1, .2]])


def test_all_first_choices_are_seated_before_second_ones():
    routing, losses = decide(np.log(THREE), configs.MoE(experts=3, active=2), 2)
    assert routing.expert[0].tolist() == [[0, 1], [1, 0], [0, 2]]
    # Expert 0 is the first choice of tokens 0 and 2 and the second of token 1: token 1 waits though it comes earlier.
    # Expert 1 is the first choice of token 1, then the second of token 0.
    assert routing.slot[0].tolist() == [[0, 1], [0, 2], [1, 0]]
    assert routing.kept[0].tolist() == [[True, True], [True, False], [True, True]]
    assert losses.load.tolist() == [3, 2, 1] and losses.dropped == 1


def test_priority_by_score_seats_the_surest_tokens_first():
    moe = configs.MoE(experts=3, active=1, renormalise=False, priority="score")
    # Expert 0 is wanted with .6 (token 0), .5 (1) and .7 (3): seats go to 3, 0, 1; FIVE by position: 0, 1, 3.
    routing, _ = decide(np.log(FIVE), moe, 2)
    assert routing.expert[0, :, 0].tolist() == [0, 0, 1, 0, 2]
    assert routing.slot[0, :, 0].tolist() == [1, 2, 0, 0, 0]
    assert routing.kept[0, :, 0].tolist() == [True, False, True, True, True]


def test_priority_by_score_keeps_first_choices_before_second_ones():
    moe = configs.MoE(experts=3, active=2, renormalise=False, priority="score")
    # By best weight the tokens stand 2 (.7), 0 (.6), 1 (.5).  Expert 0: 2 and 0 first, then 1's second choice.
    routing, _ = decide(np.log(THREE), moe, 2)
    assert routing.slot[0].tolist() == [[1, 1], [0, 2], [0, 0]]


def test_equal_scores_are_seated_by_position():
    moe = configs.MoE(experts=3, active=1, renormalise=False, priority="score")
    routing, _ = decide(np.log(np.tile([.5, .3, .2], (40, 1))), moe, 2)
    assert routing.slot[0, :, 0].tolist() == list(range(40))


def test_groups_know_nothing_of_each_other():
    both, _ = decide(np.log(np.stack([FIVE, FIVE[::-1]])), ONE_OF_3, 2)
    for group, rows in enumerate((FIVE, FIVE[::-1])):
        alone, _ = decide(np.log(rows), ONE_OF_3, 2)
        for part, whole in zip(alone, both, strict=True):
            assert np.array_equal(part[0], whole[group])


def logit(p):
    return np.log(np.asarray(p) / (1 - np.asarray(p)))


def test_a_sigmoid_routers_bias_moves_the_choice_and_not_the_weights():
    scores = [[.8, .5, .6, .2]]
    moe = configs.MoE(experts=4, active=2, router="sigmoid", scale=2.5)
    routing, _ = decide(logit(scores), moe, 1)
    assert routing.expert[0].tolist() == [[0, 2]]
    close(routing.weight[0], [[2.5 * 8 / 14, 2.5 * 6 / 14]])  # .8 / (.8 + .6)
    # With the bias the choice sees [.3, .5, .6, .65].
    routing, losses = decide(logit(scores), moe, 1, bias=[-.5, 0, 0, .45])
    assert routing.expert[0].tolist() == [[3, 2]]
    close(routing.weight[0], [[2.5 * .25, 2.5 * .75]])  # .2 / (.2 + .6) and .6 / (.2 + .6)
    # Scores as shares: [.8, .5, .6, .2] / 2.1, f = [0, 0, 1/2, 1/2]: 4 × (.3 + .1) / 2.1
    close(losses.balance, 1.6 / 2.1)
    plain = configs.dataclasses.replace(moe, renormalise=False, scale=1.0)
    close(decide(logit(scores), plain, 1, bias=[-.5, 0, 0, .45])[0].weight[0], [[.2, .6]])


def test_only_sigmoid_listens_to_the_bias():
    routing, _ = decide(np.log(FIVE), ONE_OF_3, 5, bias=[-9, 0, 9])
    assert routing.expert[0, :, 0].tolist() == [0, 0, 1, 0, 2]


def test_group_limited_routing_takes_the_groups_whose_two_best_sum_highest():
    # Three groups of two: .30 + .02 = .32, .20 + .15 = .35, .17 + .16 = .33.  The best expert of all is left out.
    p = [[.30, .02, .20, .15, .17, .16]]
    moe = configs.MoE(experts=6, active=2, expert_groups=3, active_groups=2, renormalise=False)
    routing, losses = decide(np.log(p), moe, 1)
    assert routing.expert[0].tolist() == [[2, 4]]
    close(routing.weight[0], [[.20, .17]])
    assert losses.load.tolist() == [0, 0, 1, 0, 1, 0]
    every = configs.dataclasses.replace(moe, active_groups=3)
    assert decide(np.log(p), every, 1)[0].expert[0].tolist() == [[0, 2]]
    # Two groups of three: all sum to .52 and .48, the two best to .35 and .38.
    p = [[.18, .17, .17, .28, .10, .10]]
    moe = configs.MoE(experts=6, active=2, expert_groups=2, active_groups=1, renormalise=False)
    routing, _ = decide(np.log(p), moe, 1)
    assert routing.expert[0].tolist() == [[3, 4]]
    close(routing.weight[0], [[.28, .10]])


def test_groups_of_one_expert_limit_by_that_expert():
    moe = configs.MoE(experts=3, active=1, expert_groups=3, active_groups=2, renormalise=False)
    routing, _ = decide(np.log(FIVE), moe, 5)
    assert routing.expert[0, :, 0].tolist() == [0, 0, 1, 0, 2]


def test_group_limits_of_a_sigmoid_router_see_the_bias():
    # Groups (.8, .3) and (.5, .4): with the bias (.3, .3) and (.5, .4), so the second group wins.
    moe = configs.MoE(experts=4, active=2, router="sigmoid", expert_groups=2, active_groups=1, renormalise=False)
    assert decide(logit([[.8, .3, .5, .4]]), moe, 1)[0].expert[0].tolist() == [[0, 1]]
    routing, _ = decide(logit([[.8, .3, .5, .4]]), moe, 1, bias=[-.5, 0, 0, 0])
    assert routing.expert[0].tolist() == [[2, 3]]
    close(routing.weight[0], [[.5, .4]])


# Relative distance to the best, (best - logit) / max(|logit|, best): where it is above 2 × .1, an expert is not seen.
CLOSE = np.array([[2.0, 1.9, 1.0, -3.0],  # 0, .05, .5, 1.67; then, of 1.9: 0, .47, 1.63
                  [-1.0, -1.1, -5.0, -1.2],  # 0, .09, .8, .17; then, of -1.1: 0, .78, .08
                  [-1.3, -1.0, -9.0, -8.0],  # .23, 0, .89, .88; then, of -1.3: 0, .86, .84
                  [.5, 1.0, .82, .6]])  # .5, 0, .18, .4; then, of .82: .39, 0, .27
MIXER = configs.MoE(experts=4, active=2, router="sparsemixer", mixer_gap=.1)


def mixed(logits):
    """The weights of CLOSE from its comments."""
    e = np.exp(logits)
    return [[e[0, 0] / (e[0, 0] + e[0, 1]), 1],
            [e[1, 0] / (e[1, 0] + e[1, 1] + e[1, 3]), e[1, 1] / (e[1, 1] + e[1, 3])],
            [1, 1],
            [e[3, 1] / (e[3, 1] + e[3, 2]), 1]]


def test_sparsemixer_weighs_the_best_among_those_close_to_it():
    routing, losses = decide(CLOSE, MIXER, 3)
    assert routing.expert[0].tolist() == [[0, 1], [0, 1], [1, 0], [1, 2]]
    # 1 / (1 + e^-.1) = .525; 1 / (1 + e^-.1 + e^-.2) = .367 and .525; 1 / (1 + e^-.18) = .545
    np.testing.assert_allclose(routing.weight[0], [[.525, 1], [.367, .525], [1, 1], [.545, 1]], atol=5e-4)
    close(routing.weight[0], mixed(CLOSE))
    # All first choices are seated before second ones: 0, 0, 1, 1, then 1, 1, 0, 2.
    assert routing.slot[0].tolist() == [[0, 2], [1, 3], [0, 2], [1, 0]]
    assert losses.load.tolist() == [3, 4, 1, 0] and losses.dropped == 1
    # The losses are those of a softmax over all: f = [3, 4, 1, 0] / 8.
    p = np.exp(CLOSE) / np.exp(CLOSE).sum(-1, keepdims=True)
    close(losses.balance, 4 * (p.mean(0) @ [3, 4, 1, 0]) / 8)
    close(losses.share, p.mean(0))
    close(losses.z, np.mean(np.log(np.exp(CLOSE).sum(-1)) ** 2))


def test_sparsemixer_of_one_expert_and_of_a_wide_gap():
    one = configs.dataclasses.replace(MIXER, active=1, scale=3.0)
    routing, _ = decide(CLOSE, one, 4)
    assert routing.expert[0].tolist() == [[0], [0], [1], [1]]
    close(routing.weight[0], 3 * np.array(mixed(CLOSE))[:, :1])
    # Where all are close: a softmax over all, then over those that are left.
    routing, _ = decide(np.log(FOUR), configs.dataclasses.replace(MIXER, mixer_gap=99.0), 3)
    assert routing.expert[0].tolist() == [[0, 1], [3, 2], [1, 3]]
    close(routing.weight[0], [[.5, .3 / .5], [.4, .3 / .6], [.6, .3 / .4]])
    # Where only equals are: both see each other once.
    routing, _ = decide([[1, 1, 0, 0]], configs.dataclasses.replace(MIXER, mixer_gap=0.0), 1)
    assert routing.expert[0].tolist() == [[0, 1]]
    close(routing.weight[0], [[.5, 1]])


def test_sparsemixer_has_no_gradient_through_its_masks():
    """That of softmaxes over the experts in sight, as if these were given."""
    upstream = np.random.default_rng(0).normal(size=(4, 2))
    step, want = 1e-5, np.zeros((4, 4))
    for at in np.ndindex(4, 4):
        move = np.zeros((4, 4))
        move[at] = step
        want[at] = np.sum(upstream * (np.array(mixed(CLOSE + move)) - mixed(CLOSE - move))) / 2 / step

    def cost(logits):
        return jnp.sum(router.sparsemixer(logits, jnp.zeros(4), MIXER)[1] * jnp.asarray(upstream[None], jnp.float32))

    got = jax.grad(cost)(jnp.asarray(CLOSE[None], jnp.float32))[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not np.any(np.asarray(got)[[0, 1, 3], [2, 2, 0]]) and not np.any(np.asarray(got)[2])


# Expert 0's scores are the first column, expert 1's the second.
PAIRS = np.array([[.9, .1], [.8, .2], [.6, .4], [.55, .45]])


def test_expert_choice_lets_experts_take_their_best_tokens():
    moe = configs.MoE(experts=2, active=1, router="expert_choice", capacity_factor=1.0)
    assert router.capacity(moe, 4, True) == 2  # 4 × 1 / 2
    routing, losses = decide(np.log(PAIRS), moe, 2)
    assert routing.expert[0].tolist() == [[0, 1]] * 4
    close(routing.weight[0], PAIRS)
    # Expert 0 ranks tokens 0 1 2 3; expert 1 ranks 3 2 1 0.
    assert routing.slot[0].tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert routing.kept[0].tolist() == [[True, False], [True, False], [False, True], [False, True]]
    assert losses.load.tolist() == [2, 2] and losses.dropped == 0
    close(losses.balance, 1)  # f is 1/2 for both, and P sums to 1
    # With one seat each, tokens 1 and 2 are nobody's.
    assert decide(np.log(PAIRS), moe, 1)[0].kept[0].sum(-1).tolist() == [1, 0, 0, 1]


def test_expert_choice_takes_the_earlier_of_equal_tokens():
    moe = configs.MoE(experts=2, active=1, router="expert_choice", scale=2.0)
    routing, _ = decide(np.log(np.full((40, 2), .5)), moe, 3)
    assert routing.slot[0, :, 1].tolist() == list(range(40))
    close(routing.weight, 1)  # 2 × .5


@pytest.mark.parametrize(("tokens", "active", "experts", "factor", "seats"), [
    (8, 2, 4, 1.25, 5),  # 4 × 1.25
    (24, 1, 4, 5 / 6, 5),  # 6 × 5 / 6, in floating point 5.000000000000000
    (10, 1, 1, 1.1, 10),  # 11 seats, but only 10 tokens
    (100, 1, 10, 1.1, 11),
    (100, 2, 4, 1.1, 55),  # 50 × 1.1 is 55.00000000000001
    (5, 1, 3, 1.0, 2),  # 1.67
    (7, 2, 64, 1.0, 1),  # .22: at least one
    (3, 2, 64, 1e-9, 1),
    (9, 2, 4, None, 9),  # all may come
    (9, 2, 4, 100.0, 9),
])
def test_capacity(tokens: int, active: int, experts: int, factor: float | None, seats: int):
    moe = configs.MoE(experts=experts, active=active, capacity_factor=factor, eval_capacity_factor=0.1)
    assert router.capacity(moe, tokens, True) == seats


def test_capacity_in_evaluation_has_its_own_factor():
    moe = configs.MoE(experts=4, active=2, capacity_factor=1.0)
    assert [router.capacity(moe, 12, training) for training in (True, False)] == [6, 12]
    moe = configs.MoE(experts=4, active=2, capacity_factor=1.0, eval_capacity_factor=1.5)
    assert [router.capacity(moe, 12, training) for training in (True, False)] == [6, 9]
    # An expert that takes every token would be no choice.
    moe = configs.MoE(experts=4, active=2, capacity_factor=1.0, router="expert_choice")
    assert [router.capacity(moe, 12, training) for training in (True, False)] == [6, 6]


@pytest.mark.parametrize("active", [1, 2, 3])
def test_a_balanced_router_has_a_balance_loss_of_one(active: int):
    # Token t prefers experts t, t+1, t+2, … (mod 5): every expert is chosen equally often, and P is 1/5 for all.
    p = np.array([np.roll([.4, .25, .15, .12, .08], t) for t in range(5)])
    _, losses = decide(np.log(p), configs.MoE(experts=5, active=active), 1)
    assert losses.load.tolist() == [active] * 5
    close(losses.balance, 1)


def test_a_collapsed_router_has_a_balance_loss_of_the_number_of_experts():
    _, losses = decide(np.tile([50, 0, 0, 0], (6, 1)), configs.MoE(experts=4, active=1), 1)
    close(losses.balance, 4)
    assert losses.dropped == 5


# Two groups that lean to opposite sides: each alone is f = [1, 0], P = [3/4, 1/4] (or mirrored).
LEANING = np.array([[[.75, .25]] * 2, [[.25, .75]] * 2])


def test_balance_over_the_batch_forgives_what_groups_do_not():
    group = configs.MoE(experts=2, active=1, balance_scope="group")
    close(decide(np.log(LEANING), group, 2)[1].balance, 1.5)  # 2 × (1 × .75)
    batch = configs.dataclasses.replace(group, balance_scope="batch")
    close(decide(np.log(LEANING), batch, 2)[1].balance, 1)  # f = [1/2, 1/2]


def test_the_batch_of_the_balance_loss_is_that_of_all_devices(inside):
    def balance(logits):
        return collectives.mean(router.route(logits, jnp.zeros(2), moe, 2)[1].balance)

    moe = configs.MoE(experts=2, active=1, balance_scope="batch")
    logits = np.log(np.concatenate([LEANING, LEANING[:1], LEANING[:1]])).astype(np.float32)
    # 6 choices of expert 0 and 2 of expert 1; P = [.75 × 3 + .25, .25 × 3 + .75] / 4 = [.625, .375]
    # 2 × (.75 × .625 + .25 × .375)
    for mesh, place in ((configs.Mesh(), P()), (configs.Mesh(data=2, expert=2), P(("data", "expert")))):
        close(inside(balance, logits, mesh=mesh, before=place), 1.125)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_top_is_top_k_also_among_equals(k: int):
    random = np.random.default_rng(k)
    scores = jnp.asarray(random.integers(0, 3, (2, 50, 9)), jnp.float32)  # nine scores of three values
    upstream = jnp.asarray(random.normal(size=(2, 50, k)), jnp.float32)

    def run(function):
        best, back, index = jax.vjp(function, scores, has_aux=True)
        return best, index, back(upstream)[0]

    for got, want in zip(*jax.jit(lambda: (run(lambda s: router.top(s, k)), run(lambda s: jax.lax.top_k(s, k))))(),
                         strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("k", [1, 4])
def test_top_passes_over_experts_that_are_shut_out(k: int):
    scores = jnp.asarray([[[-jnp.inf, -3., -jnp.inf, -1., -2., -4.]]])
    best, index = router.top(scores, k)
    assert index[0, 0].tolist() == [3, 4, 1, 5][:k]
    assert best[0, 0].tolist() == [-1, -2, -3, -4][:k]


def test_places_counts_equal_entries_before_each():
    line = np.random.default_rng(0).integers(0, 7, (3, 29), dtype=np.int32)
    want = [[row[:i].tolist().count(row[i]) for i in range(29)] for row in line]
    assert np.asarray(router.places(jnp.asarray(line), 7)).tolist() == want


@pytest.fixture(scope="module")
def switch():
    with np.load(SWITCH / "reference.npz") as arrays:
        return dict(arrays), json.loads((SWITCH / "meta.json").read_text())


def test_the_switch_layer_of_transformers_routes_alike(switch):
    ref, meta = switch
    moe = configs.MoE(experts=4, active=1, renormalise=False, capacity_factor=5 / 6)
    seats = router.capacity(moe, 24, True)
    assert seats == meta["expert_capacity"]
    logits = ref["layer_input"] @ ref["router"].T
    np.testing.assert_allclose(logits, ref["layer_router_logits"], atol=3e-6)  # both round 32 products
    routing, losses = decide(ref["layer_router_logits"], moe, seats)
    np.testing.assert_allclose(jax.nn.softmax(jnp.asarray(logits), -1), ref["layer_router_probs"], atol=1e-6)
    assert np.array_equal(routing.expert[..., 0], ref["layer_expert_index"])
    np.testing.assert_allclose(routing.weight, ref["layer_gate"], atol=1e-6)
    assert np.array_equal(~routing.kept[..., 0], ref["layer_dropped"])
    assert losses.dropped == meta["dropped"] == 8
    np.testing.assert_allclose(losses.z, ref["layer_z_loss"], rtol=1e-6)
    np.testing.assert_allclose(losses.balance, ref["layer_load_balancing_loss"], rtol=1e-6)


def test_the_loss_functions_of_transformers_give_the_same(switch):
    ref, _ = switch
    _, losses = decide(ref["lossfn_router_logits"], configs.MoE(experts=4, active=1), 10)
    np.testing.assert_allclose(losses.z, ref["lossfn_z_loss"], rtol=1e-6)
    np.testing.assert_allclose(losses.balance, ref["lossfn_load_balancing_loss"], rtol=1e-6)


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted", "blocked"])
def test_the_switch_layer_of_transformers_gives_the_same_output(switch, inside, dispatcher: str):
    ref, meta = switch
    moe = configs.MoE(experts=4, active=1, renormalise=False, capacity_factor=5 / 6)

    def layer(x, w, up, down):
        routing, _ = router.route(jnp.einsum("rmd,ed->rme", x, w), jnp.zeros(4), moe, meta["expert_capacity"])
        return DISPATCHERS[dispatcher](x, routing, meta["expert_capacity"], Experts(
            up, down, jax.nn.relu))

    up, down = ref["wi"].transpose(0, 2, 1)[:, :, None], ref["wo"].transpose(0, 2, 1)
    got = inside(layer, ref["layer_input"], ref["router"], up, down)
    np.testing.assert_allclose(got, ref["layer_output"], atol=1e-5)  # 80 products of size 1, float32
    assert np.all(np.asarray(got)[ref["layer_dropped"]] == 0)

"""The planner's arithmetic, against figures worked out by hand or known from papers."""

import math
import subprocess
import sys
from collections import Counter

import pytest

from moejax.config import Config, Model, MoE
from moejax.parallel.hardware import DEVICES
from moejax.plan import cost

H100 = DEVICES["H100"]
ALONE = dict.fromkeys(("data", "fsdp", "pipeline", "expert", "tensor"), 1)
CONFIG = Config(model=Model(layers=120, d_model=10752, heads=168, kv_heads=1, head_dim=128,
                            moe=MoE(experts=16, active=2)))


def test_it_imports_no_jax():
    done = subprocess.run([sys.executable, "-c", "import sys, moejax.plan.cost; print('jax' in sys.modules)"],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_a_matmul_takes_as_long_as_what_it_needs_more_of():
    work, talk = cost.step_seconds(Counter({(989e12, 1.0): 2, (1.0, 3.35e12): 3}), {}, ALONE, "bfloat16", H100)
    assert (work, talk) == (pytest.approx(5), 0)


@pytest.mark.parametrize("axes, lengths, fast", [
    ("tensor", {"tensor": 8}, True), ("tensor", {"tensor": 16}, False), ("expert", {"expert": 4, "tensor": 2}, True),
    ("data", {"data": 2, "tensor": 8}, False), ("data+fsdp", {"data": 2, "fsdp": 4}, True)])
def test_partners_within_a_domain_are_linked(axes, lengths, fast):
    assert cost.speed(axes, ALONE | lengths, H100) == (H100.link if fast else H100.network)


def test_days_hours_and_dollars():
    found = cost.training(1e12, 1e12, 1000, H100, 0.5)
    seconds = 1e24 / (1000 * 989e12 * 0.5)
    assert found["days"] == pytest.approx(seconds / 86400)
    assert found["dollars"] == pytest.approx(1000 * seconds / 3600 * 2.95)
    assert cost.training(1e12, 1e12, 8, DEVICES["GB300"], 0.5)["dollars"] is None


def test_chinchilla_found_itself():
    found = cost.chinchilla(70e9, 1.4e12)
    assert found["parameters"] == pytest.approx(70e9) and found["tokens"] == pytest.approx(1.4e12)


def test_experts_touched_go_from_the_active_ones_to_all():
    assert cost.touched(16, 2, 1) == pytest.approx(2)
    assert cost.touched(16, 2, 2) == pytest.approx(2 + 2 * 14 / 16)
    assert cost.touched(16, 2, 1000) == pytest.approx(16)


def test_the_cache_of_one_kv_head_is_not_split():
    assert cost.cache_per_token(CONFIG) == cost.cache_per_token(CONFIG, tensor=8) == 120 * 2 * 128 * 2


def test_decoding_turns_from_bytes_to_flops_where_it_says():
    weights = {"shared": 10e9, "experts": 100e9}
    turn = cost.turning(weights, CONFIG, 1024, 8, H100)
    bound = [cost.decoding(weights, CONFIG, batch, 1024, 8, H100)["compute_bound"] for batch in (turn - 1, turn)]
    assert bound == [0.0, 1.0]
    # Without experts and context: as many sequences as FLOPs fit into the time of a byte.
    dense = cost.turning({"shared": 10e9, "experts": 0.0}, CONFIG, 0, 8, H100)
    assert dense == math.ceil(989e12 / 3.35e12)
    assert cost.turning({"shared": 1e6, "experts": 0.0}, CONFIG, 10**7, 8, DEVICES["v7x"]) is None


def test_the_worst_step_reads_an_expert_for_every_choice():
    weights = {"shared": 1e9, "experts": 160e9}
    for batch, experts in ((1, 2), (3, 6), (8, 16), (9, 16)):
        assert cost.decoding(weights, CONFIG, batch, 8, 8, H100, worst=True)["experts"] == experts


@pytest.mark.parametrize("acceptance, draft, price, gain", [(1.0, 4, 0.0, 5), (0.0, 4, 0.0, 1), (0.8, 4, 0.05, 2.801)])
def test_speculation(acceptance, draft, price, gain):
    assert cost.speculation(acceptance, draft, price) == pytest.approx(gain, abs=1e-3)

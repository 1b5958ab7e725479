"""The table of axes: how weights, batches and optimizer state lie on meshes of plain lengths."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moejax.config import AXES
from moejax.parallel import axes

ONE = dict.fromkeys(AXES, 1)
# A length of its own for every axis, so that no two can be mistaken for each other.
PRIMES = {"data": 11, "fsdp": 2, "pipeline": 3, "expert": 5, "tensor": 7}


def test_names_come_in_the_order_of_the_dimensions():
    assert axes.names("layer expert: embed -> gate hidden") == ("layer", "expert", "embed", "gate", "hidden")
    assert axes.names("norm") == ("norm",)


def test_every_rule_names_an_axis_of_the_mesh():
    assert {axis for axis in axes.RULES.values() if axis} <= set(AXES)
    assert set(axes.BATCH) == {"data", "fsdp", "expert"}


@pytest.mark.parametrize(("text", "shape", "place"), [
    ("vocab -> embed", (21, 10), P("tensor", "fsdp")),
    ("embed -> vocab", (10, 21), P("fsdp", "tensor")),
    ("embed -> heads head", (10, 14, 13), P("fsdp", "tensor", None)),
    ("heads head -> embed", (14, 13, 10), P("tensor", None, "fsdp")),
    ("embed -> choice", (10, 5), P("fsdp", None)),
    ("layer choice", (6, 5), P("pipeline", None)),
    ("layer norm", (6, 10), P("pipeline", None)),
    ("layer expert: embed -> gate hidden", (6, 10, 4, 2, 21), P("pipeline", "expert", "fsdp", None, "tensor")),
    ("layer expert: hidden -> embed", (6, 10, 21, 4), P("pipeline", "expert", "tensor", "fsdp")),
])
def test_spec_by_hand(text: str, shape: tuple[int, ...], place: P):
    assert axes.spec(text, shape, PRIMES) == place
    assert axes.spec(text, shape, ONE) == P(*[None] * len(shape))  # an axis of length 1 splits nothing


def test_spec_takes_the_shape_of_a_real_or_abstract_mesh():
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 1, 7), AXES)
    assert axes.spec("embed -> kv head", (10, 14, 3), mesh.shape) == P("fsdp", "tensor", None)


@pytest.mark.parametrize(("kv", "axis"), [(1, None), (6, None), (7, "tensor"), (14, "tensor")])
def test_fewer_kv_heads_than_shards_lie_whole_on_every_shard(kv: int, axis: str | None):
    assert axes.spec("embed -> kv head", (10, kv, 3), PRIMES) == P("fsdp", axis, None)


@pytest.mark.parametrize(("text", "shape", "said"), [
    ("vocab -> embed", (20, 10), ("vocab", "20", "tensor 7")),
    ("embed -> kv head", (10, 8, 3), ("kv", "8", "tensor 7")),  # more than the shards, yet not a multiple
    ("expert: hidden -> embed", (5, 21, 9), ("embed", "9", "fsdp 2")),
])
def test_a_dimension_that_does_not_divide_is_an_error_with_both_numbers(text, shape, said):
    with pytest.raises(ValueError) as error:
        axes.spec(text, shape, PRIMES)
    assert all(part in str(error.value) for part in said)


def test_axes_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(ValueError):
        axes.spec("embed -> vocab", (10, 21, 3), ONE)
    with pytest.raises(KeyError):
        axes.spec("embed -> flavour", (10, 21), ONE)


def test_rows_leave_out_axes_of_length_one():
    assert axes.rows(PRIMES) == P(("data", "fsdp", "expert"))
    assert axes.rows(ONE | {"expert": 2, "tensor": 4}) == P(("expert",))
    assert axes.rows(ONE | {"tensor": 4}) == P(None)


@pytest.mark.parametrize(("place", "shape", "after"), [
    (P("fsdp", None, None), (10, 22, 33), P("fsdp", "data", None)),  # the first free dimension that divides by 11
    (P("fsdp", None, None), (10, 21, 33), P("fsdp", None, "data")),
    (P(None, "tensor"), (21, 22), P(None, "tensor")),  # 22 divides, but is taken
    (P(None), (10,), P(None)),
    (P(), (), P()),
])
def test_one_free_dimension_is_split_further(place: P, shape: tuple[int, ...], after: P):
    assert axes.further(place, shape, "data", PRIMES["data"]) == after
    assert axes.further(place, shape, "data", 1) == place


def test_further_splits_begin_where_they_may():
    assert axes.further(P(None, None), (22, 33), "pipeline", 11, first=1) == P(None, "pipeline")


def test_missing_axes_are_those_a_gradient_is_summed_over():
    assert axes.missing(P("fsdp", "tensor")) == ("data", "expert", "pipeline")
    assert axes.missing(P("pipeline", "expert", "fsdp", None, "tensor")) == ("data",)
    assert axes.missing(P(None)) == ("data", "fsdp", "expert", "pipeline")
    assert axes.missing(P("fsdp"), ("fsdp", "tensor")) == ("tensor",)

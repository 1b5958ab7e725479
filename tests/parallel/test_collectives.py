"""Each verb's forward and transpose against numpy, on global arrays.

A value that differs between devices is written as their copies side by side: shard i of the array is device i's.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.config import AXES, Mesh
from moejax.parallel import collectives
from moejax.parallel.mesh import make_mesh

COLLECTIVE = re.compile(r"\b(psum\w*|all_gather\w*|reduce_scatter|all_to_all|ppermute|pmax|pvary|pcast)\[")


def program(function, mesh: Mesh, before: P, after: P):
    return jax.shard_map(function, mesh=make_mesh(mesh, jax.devices()[: mesh.devices()]), in_specs=before,
                         out_specs=after)


def both_ways(function, mesh: Mesh, before: P, after: P, shape: tuple[int, ...]):
    """(input, output, a cotangent of the output, what it becomes on the way back)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    run = program(function, mesh, before, after)
    grad = rng.normal(size=jax.eval_shape(run, x).shape).astype(np.float32)
    y, back = jax.jit(lambda x, grad: (run(x), jax.vjp(run, x)[1](grad)[0]))(x, grad)
    return x, np.asarray(y), grad, np.asarray(back)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # sums of at most 4 float32 numbers


def test_gather_joins_the_shards_and_sums_gradients_back_into_them():
    x, y, grad, back = both_ways(lambda x: collectives.gather(x, 1), Mesh(fsdp=3), P(None, "fsdp"), P("fsdp"), (2, 15))
    close(y, np.concatenate([x] * 3))  # every device holds all of x
    close(back, grad.reshape(3, 2, 15).sum(0))


def test_enter_copies_to_the_tensor_shards_and_sums_their_gradients():
    def enter(x):
        return collectives.enter(x, False)

    x, y, grad, back = both_ways(enter, Mesh(tensor=3), P(), P("tensor"), (2, 5, 7))
    close(y, np.concatenate([x] * 3))
    close(back, grad.reshape(3, 2, 5, 7).sum(0))


def test_enter_with_sequence_joins_the_slices_of_time():
    def enter(x):
        return collectives.enter(x, True)

    x, y, grad, back = both_ways(enter, Mesh(tensor=3), P(None, "tensor"), P("tensor"), (2, 15, 7))
    close(y, np.concatenate([x] * 3))
    close(back, grad.reshape(3, 2, 15, 7).sum(0))


def test_leave_sums_the_partial_products_and_hands_the_gradient_to_all():
    def leave(x):
        return collectives.leave(x, False)

    x, y, grad, back = both_ways(leave, Mesh(tensor=3), P("tensor"), P(), (6, 5, 7))
    close(y, x.reshape(3, 2, 5, 7).sum(0))
    close(back, np.concatenate([grad] * 3))


def test_leave_with_sequence_keeps_a_slice_of_time_of_the_sum():
    def leave(x):
        return collectives.leave(x, True)

    x, y, grad, back = both_ways(leave, Mesh(tensor=3), P("tensor"), P(None, "tensor"), (6, 15, 7))
    close(y, x.reshape(3, 2, 15, 7).sum(0))
    close(back, np.concatenate([grad] * 3))


def test_exchange_brings_every_device_the_buffers_of_its_experts():
    # 2 devices, 6 experts, of which 3 live on each; 5 seats a device: [expert, seat, D] on each device.
    def exchange(x):
        return collectives.exchange(x, 0, 1)

    x, y, grad, back = both_ways(exchange, Mesh(expert=2), P(None, "expert"), P("expert"), (6, 10, 7))
    # Device d gets experts 3d, 3d+1, 3d+2 from device 0, then from device 1: side by side that is x itself.
    close(y, x)
    close(back, grad)
    # What makes it an exchange: device 0 now holds rows of both devices.
    local = program(exchange, Mesh(expert=2), P(None, "expert"), P(None, "expert"))(x)
    first = np.asarray(local)[:, :10]  # device 0: its 3 experts, the seats of both devices
    close(first, x[:3])


def test_exchange_there_and_back_is_the_identity():
    def twice(x):
        return collectives.exchange(collectives.exchange(x, 0, 1), 1, 0)

    x, y, grad, back = both_ways(twice, Mesh(expert=4), P(None, "expert"), P(None, "expert"), (8, 12, 3))
    close(y, x)
    close(back, grad)


def test_collect_joins_tokens_and_deliver_sums_results_back():
    x, y, grad, back = both_ways(collectives.collect, Mesh(expert=3), P("expert"), P(None, "expert"), (6, 5))
    close(y, np.concatenate([x] * 3, 1))
    close(back, grad.reshape(6, 3, 5).sum(1))
    x, y, grad, back = both_ways(collectives.deliver, Mesh(expert=3), P(None, "expert"), P("expert"), (6, 15))
    close(y, x.reshape(6, 3, 5).sum(1))
    close(back, np.concatenate([grad] * 3, 1))


def test_total_sums_over_the_axes_on_which_a_value_varies_and_only_those():
    mesh = Mesh(data=2, tensor=3)

    def totals(x):
        both = collectives.total(x, ("data", "tensor"))
        return both, collectives.total(both, ("data", "tensor")), collectives.total({"a": x}, ("tensor",))["a"]

    x = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    both, again, tensor = program(totals, mesh, P("data", "tensor"), (P(), P(), P("data")))(x)
    close(both, x.sum((0, 1))[None, None])
    close(again, both)  # what all devices hold alike is summed already
    close(tensor, x.sum(1)[:, None])


def test_total_transposes_to_nothing():
    x, _, grad, back = both_ways(lambda x: collectives.total(x, ("data",)), Mesh(data=3), P("data"), P(), (3, 5))
    close(back, np.concatenate([grad] * 3).reshape(x.shape))


def test_vary_changes_no_value_and_sums_gradients():
    def vary(x):
        return collectives.vary({"a": x}, ("data", "expert"))["a"]

    x, y, grad, back = both_ways(vary, Mesh(data=2, tensor=2), P(), P("data"), (3, 5))
    close(y, np.concatenate([x] * 2))
    close(back, grad.reshape(2, 3, 5).sum(0))


def test_match_varies_where_any_of_the_others_does():
    def types(x, y):
        zero = jnp.zeros(())
        found.extend(map(collectives.varying, (zero, collectives.match(zero, x), collectives.match(zero, x, y))))
        return x

    found: list = []
    program(types, Mesh(data=2, tensor=2), (P("data"), P("tensor")), P("data"))(np.ones(2), np.ones(2))
    assert found == [frozenset(), {"data"}, {"data", "tensor"}]


def test_mean_is_over_the_batch_axes_and_tensor():
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    mesh, place = Mesh(data=2, expert=2), P("data", "expert")
    close(program(collectives.mean, mesh, place, P())(x), x.mean((0, 1))[None, None])
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    mesh, place = Mesh(fsdp=2, tensor=2), P("fsdp", "tensor")
    close(program(collectives.mean, mesh, place, P())(x), x.mean((0, 1))[None, None])


def test_agree_makes_copies_one_value_whose_gradient_counts_once():
    def square(x):
        copies = collectives.enter(x, False)
        return collectives.agree(copies * copies)

    x, y, grad, back = both_ways(square, Mesh(tensor=4), P(), P(), (1, 2, 3))
    close(y, x * x)
    close(back, 2 * x * grad)


def test_everywhere_joins_along_a_dimension_and_highest_takes_the_largest():
    x = np.random.default_rng(2).normal(size=(2, 6)).astype(np.float32)
    close(program(lambda x: collectives.everywhere(x, 1), Mesh(tensor=3), P(None, "tensor"), P())(x), x)
    close(program(collectives.highest, Mesh(tensor=3), P(None, "tensor"), P())(x), x.reshape(2, 3, 2).max(1))
    x, _, _, back = both_ways(collectives.highest, Mesh(tensor=3), P(None, "tensor"), P(), (2, 6))
    close(back, np.zeros_like(x))


def test_index_counts_the_devices_of_an_axis():
    def number(x):
        return x + collectives.index("expert") + 10 * collectives.index("tensor")

    x = np.zeros((3, 2), np.int32)
    y = program(number, Mesh(expert=3, tensor=2), P("expert", "tensor"), P("expert", "tensor"))(x)
    assert np.asarray(y).tolist() == [[0, 10], [1, 11], [2, 12]]


VERBS = {  # function, the axis it works on, where its input lies there
    "gather": (lambda x: collectives.gather(x, 1), "fsdp", P("fsdp")),
    "enter": (lambda x: collectives.enter(x, False), "tensor", P()),
    "enter sequence": (lambda x: collectives.enter(x, True), "tensor", P("tensor")),
    "leave": (lambda x: collectives.leave(x, False), "tensor", P("tensor")),
    "leave sequence": (lambda x: collectives.leave(x, True), "tensor", P("tensor")),
    "exchange": (lambda x: collectives.exchange(x, 0, 1), "expert", P("expert")),
    "collect": (collectives.collect, "expert", P("expert")),
    "deliver": (collectives.deliver, "expert", P("expert")),
    "total": (lambda x: collectives.total(x, AXES), "pipeline", P("pipeline")),
    "mean": (collectives.mean, "data", P("data")),
    "agree": (collectives.agree, "tensor", P("tensor")),
    "everywhere": (lambda x: collectives.everywhere(x, 0), "tensor", P("tensor")),
    "highest": (collectives.highest, "tensor", P("tensor")),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_axes_of_length_one_is_nothing(verb: str):
    function, axis, place = VERBS[verb]
    x = jnp.ones((4, 4, 5))
    assert not COLLECTIVE.search(str(jax.make_jaxpr(program(function, Mesh(), P(), P()))(x)))
    long = program(function, Mesh(**{axis: 2}), place, P(axis))
    assert COLLECTIVE.search(str(jax.make_jaxpr(long)(x)))

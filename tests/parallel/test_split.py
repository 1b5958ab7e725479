"""A traced function cut in two, against the whole: gradients of inputs now, those of weights later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moejax.parallel.split import Split


def trace(function, *args):
    return jax.make_jaxpr(function)(*args)


def layer(x, w):
    return jnp.tanh(x @ w), jnp.sum(x)


def loop(x, w):
    return lax.scan(layer, x, w)[0]


def two_loops(x, w):
    up, down = w
    return loop(loop(x, up) * 2., down)


def plain(x, w):
    return jnp.sin(x @ w["a"]) @ w["b"]


def nested(x, w):
    """A scan of scans, the carry of the inner one also a result of the outer one."""
    def body(x, ws):
        y = loop(x, ws)
        return y + x, y

    x, ys = lax.scan(body, x, w)
    return x + jnp.sum(ys, 0)


def backwards(x, w):
    return lax.scan(layer, x, w, reverse=True)[0]


def fixed_beside_slices(x, w):
    """A weight that every step uses: its gradient is a carry of the backward scan."""
    shared, stack = w

    def body(x, w):
        return jnp.tanh(x @ w + x @ shared), None

    return lax.scan(body, x, stack)[0]


def conditional(x, w):
    """As of slots that are left out."""
    def body(x, inputs):
        w, here = inputs
        return lax.cond(here, lambda x: layer(x, w)[0], lambda x: x, x), None

    return lax.scan(body, x, (w, jnp.array([True, False, True])))[0]


def draw(*shape: int):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape, scale=.5), jnp.float32)


CASES = {  # function, weights, dot_generals of now and of later
    "one scan": (loop, draw(3, 5, 5), 1, 1),
    "two scans": (two_loops, (draw(3, 5, 5), draw(2, 5, 5)), 2, 2),
    "no scan": (plain, {"a": draw(5, 7), "b": draw(7, 5)}, 2, 2),
    "nested scan": (nested, draw(2, 3, 5, 5), 1, 1),
    "reverse scan": (backwards, draw(3, 5, 5), 1, 1),
    "a weight of all steps": (fixed_beside_slices, (draw(5, 5), draw(3, 5, 5)), None, None),
    "cond in a scan": (conditional, draw(3, 5, 5), None, None),
}


def dots(jaxpr) -> int:
    """dot_generals in a jaxpr and all jaxprs inside it."""
    count = 0
    for eqn in jaxpr.eqns:
        inner = [value for value in jax.tree.leaves(list(eqn.params.values())) if hasattr(value, "jaxpr")]
        count += (eqn.primitive.name == "dot_general") + sum(dots(each.jaxpr) for each in inner)
    return count


def pulled(name: str):
    """(the backward function of leaves and dy, its arguments, which of its results are the input's gradient)."""
    function, w, *_ = CASES[name]
    x, dy = draw(4, 5), draw(5, 4).T
    _, pull = jax.vjp(function, x, w)
    leaves, tree = jax.tree.flatten(pull)

    def back(*args):
        return jax.tree.leaves(jax.tree.unflatten(tree, args[:-1])(args[-1]))

    args = [*leaves, dy]
    return back, args, [i == 0 for i in range(1 + len(jax.tree.leaves(w)))]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # the same sums, compiled apart


def merged(now, later, wanted):
    now, later = iter(now), iter(later)
    return [next(now) if first else next(later) for first in wanted]


@pytest.mark.parametrize("name", CASES)
def test_now_and_later_are_the_whole(name: str):
    back, args, wanted = pulled(name)
    split = Split(trace(back, *args), wanted)
    now, kept = split.now(*args)
    same(merged(now, split.later(kept), wanted), back(*args))


@pytest.mark.parametrize("name", CASES)
def test_kept_values_pass_between_two_compiled_functions(name: str):
    back, args, wanted = pulled(name)
    split = Split(trace(back, *args), wanted)
    now, kept = jax.jit(split.now)(*args)
    same(merged(now, jax.jit(split.later)([np.asarray(one) for one in kept]), wanted), back(*args))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] is not None])
def test_products_of_weight_gradients_are_all_later(name: str):
    back, args, wanted = pulled(name)
    whole = trace(back, *args)
    split = Split(whole, wanted)
    now = trace(split.now, *args)
    later = trace(split.later, split.now(*args)[1])
    assert (dots(now.jaxpr), dots(later.jaxpr)) == CASES[name][2:]
    assert dots(whole.jaxpr) == sum(CASES[name][2:])


def test_the_numbers_of_kept_inputs_are_right():
    for name in CASES:
        back, args, wanted = pulled(name)
        split = Split(trace(back, *args), wanted)
        kept = split.now(*args)[1]
        assert len(split.kept_inputs) == len(kept)
        for value, number in zip(kept, split.kept_inputs, strict=True):
            if number is not None:
                np.testing.assert_array_equal(value, args[number])


def test_a_weight_gradient_waits_for_its_input_and_what_came_back():
    """x @ w: later needs x, which is an input, and dy, which is too; nothing is kept twice."""
    x, w, dy = draw(4, 5), draw(5, 6), draw(4, 6)
    split = Split(trace(lambda x, w, dy: (dy @ w.T, x.T @ dy), x, w, dy), [True, False])
    assert sorted(split.kept_inputs) == [0, 2]
    (dx,), kept = split.now(x, w, dy)
    same([dx, *split.later(kept)], [dy @ w.T, x.T @ dy])


@pytest.mark.parametrize("wanted", [[True] * 4, [False] * 4, [True, False] * 2, [False, True] * 2])
def test_results_may_be_inputs_or_literals_or_twice_the_same(wanted: list[bool]):
    def function(x, y):
        z = x * y
        return y, jnp.float32(3.), z, z

    x, y = draw(3), draw(3) + 1
    split = Split(trace(function, x, y), wanted)
    now, kept = jax.jit(split.now)(x, y)
    found = merged(now, jax.jit(split.later)(kept), wanted)
    same([np.asarray(one, np.float32) for one in found], [y, np.float32(3), x * y, x * y])


@pytest.mark.parametrize("wanted", [[True, False, False, False, False], [False, True, False, True, False],
                                    [False, False, True, False, True], [True] * 5, [False] * 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_may_give_inputs_literals_and_its_carry(wanted: list[bool], reverse: bool):
    """Results of a step: a slice as it came, a constant, the carry before and after, what only the slice makes."""
    def function(x, c, w):
        def body(x, w):
            after = x * w + c
            return after, (w, jnp.float32(2.), x, w * c)

        x, ys = lax.scan(body, x, w, reverse=reverse)
        return x, *ys

    args = draw(5), draw(5) + 1, draw(3, 5)
    split = Split(trace(function, *args), wanted)
    now, kept = jax.jit(split.now)(*args)
    same(merged(now, jax.jit(split.later)(kept), wanted), function(*args))


def test_constants_of_the_trace_reach_both_parts():
    table = jnp.asarray(draw(5, 5))

    def function(x, w):
        return x @ table, w @ table

    args = draw(4, 5), draw(3, 5)
    split = Split(trace(function, *args), [True, False])
    now, kept = jax.jit(split.now)(*args)
    same([*now, *jax.jit(split.later)(kept)], function(*args))


def test_nothing_is_kept_where_all_is_wanted_now():
    back, args, wanted = pulled("two scans")
    split = Split(trace(back, *args), [True] * len(wanted))
    now, kept = split.now(*args)
    assert kept == [] and split.later(kept) == []
    same(now, back(*args))

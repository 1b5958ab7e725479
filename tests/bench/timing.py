"""Fair timing on a shared machine: cases in turn, and the median of each."""

import statistics
import time

import jax


def alternate(cases, rounds: int) -> dict[str, float]:
    """Median seconds of each jitted function over `rounds` rounds in which all of them run once, after a warm-up."""
    taken = {name: [] for name in cases}
    for function, args in cases.values():
        jax.block_until_ready(function(*args))
    for _ in range(rounds):
        for name, (function, args) in cases.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*args))
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}

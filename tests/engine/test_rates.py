"""The rates of batches: the usual one and the best one."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.engine.rates import Rates


def timed(rates: Iterable[float]) -> Rates:
    measured = Rates()
    for rate in rates:
        measured.add(rate)
    return measured


def test_one_timed_batch_gives_no_rate() -> None:
    assert not timed([1.0]).measured
    assert timed([1.0]).best == inf
    assert timed([1.0, 4000.0, 5000.0]).usual == 4000.0


@given(rates=st.lists(st.floats(1.0, 1e6), min_size=3, max_size=40))
def test_the_best_rate_is_the_greatest_measured_rate(rates: list[float]) -> None:
    measured = timed(rates)
    assert measured.best == max(rates)
    assert min(rates) <= measured.usual <= measured.best


def test_the_best_rate_falls_after_many_slower_batches() -> None:
    assert timed([9000.0, *[100.0] * 1500]).best == 9000.0
    assert timed([9000.0, *[100.0] * 2500]).best == 100.0

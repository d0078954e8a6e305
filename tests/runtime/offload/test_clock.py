"""Time without what other programs took."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from hfquant.runtime.offload import clock


def test_a_wait_between_the_clocks_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost just when time is read is in both clocks, or in neither."""
    now, waited = 100.0, 7_000_000_000

    def reading() -> Iterator[int]:
        nonlocal now, waited
        yield waited
        now, waited = now + 3, waited + 3_000_000_000  # another program has the processor here
        while True:
            yield waited

    readings = reading()
    monkeypatch.setattr(clock, "_waited", lambda: next(readings))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    assert clock.undisturbed() == pytest.approx(93.0)
    assert clock.undisturbed() == pytest.approx(93.0)


def test_it_never_goes_back() -> None:
    times = [clock.undisturbed() for _ in range(200)]
    assert all(b > a - 1e-4 for a, b in pairwise(times))  # the two clocks are not one
    assert times[-1] > times[0]


def test_a_system_that_does_not_count_has_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> int:
        raise FileNotFoundError

    monkeypatch.setattr(clock, "_waited", missing)
    assert clock.undisturbed() > 0

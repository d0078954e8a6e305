"""Sizes, times and counts, as people write and read them."""

from ..sizes import read_size, size

__all__ = ["count", "duration", "read_size", "size"]


def count(number: float) -> str:
    """135 M, 6.74 B: parameters."""
    for unit, step in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= step:
            return f"{number / step:.3g} {unit}" if number < 999.5 * step else f"{number / step:.0f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """45 s, 2 min 10 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def between(low: float, high: float) -> str:
    """20 s to 2 min: a range of times, no finer than a guess is."""
    first, last = (duration(_coarse(seconds)).replace(" 00 s", "").replace(" 00 min", "") for seconds in (low, high))
    return first if first == last else f"{first} to {last}"


def _coarse(seconds: float) -> float:
    step = next(step for limit, step in ((60, 5), (600, 60), (3600, 300), (float("inf"), 1800)) if seconds < limit)
    return max(step, step * round(seconds / step))

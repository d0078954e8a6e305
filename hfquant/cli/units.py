"""Sizes, times and counts, as people write and read them."""

import re

from ..sizes import size

__all__ = ["count", "duration", "read_size", "size"]
_STEP = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_STEP |= {f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)}


def read_size(text: str) -> int:
    """Bytes in `700MB`, `2GiB`, `1.5g` or `1000000`.  Raises ValueError on anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(found[1]) * _STEP[found[2]]) if found and found[2] in _STEP else 0
    if size <= 0:
        raise ValueError(f"cannot read `{text}` as a size; write 700MB or 2GiB")
    return size


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

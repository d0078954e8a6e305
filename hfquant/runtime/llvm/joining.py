"""Weights in tiles, as one: their tiles one after the other."""

import copy
from collections.abc import Sequence

import torch

from .layout import Tiles
from .memory import room
from .records import ROWS

PER_TILE = ("scales", "zeros", "sums")  # and codes


def joined(parts: Sequence[Tiles]) -> Tiles | None:
    """The rows of several weights as those of one; None if they differ in more than their rows.

    Weights that are parts of one already are not copied.
    """
    first = parts[0]
    if first.inner is not None or not all(_alike(first, other) for other in parts[1:]):
        return None
    if any(part.out_features % ROWS for part in parts[:-1]):
        return None
    out_features, whole = sum(part.out_features for part in parts), first.within
    if whole is not None and whole.out_features == out_features and _in_order(parts):
        return whole
    made = copy.copy(first)
    made.within, made.start, made.out_features = None, 0, out_features
    for name in PER_TILE:
        held = [getattr(part, name) for part in parts]
        if held[0] is not None:
            setattr(made, name, torch.cat(held))
    made.codes = room((sum(part.codes.shape[0] for part in parts), *first.codes.shape[1:]))
    torch.cat([part.codes for part in parts], out=made.codes)
    return made


def parts_of(whole: Tiles, out_features: Sequence[int]) -> list[Tiles]:
    """The weights that were joined, in the memory of the whole."""
    found, start = [], 0
    for rows in out_features:
        part, count = copy.copy(whole), -(-rows // ROWS)
        part.within, part.start, part.out_features = whole, start, rows
        for name in ("codes", *PER_TILE):
            held = getattr(whole, name)
            setattr(part, name, None if held is None else held[start : start + count])
        found.append(part)
        start += count
    return found


def _alike(a: Tiles, b: Tiles) -> bool:
    """Whether two weights have all but rows in common, what is done to x included."""
    if (a.level, a.runs, a.grid, a.scale_type) != (b.level, b.runs, b.grid, b.scale_type):
        return False
    if b.inner is not None or (a.sums is None) != (b.sums is None) or len(a.static) != len(b.static):
        return False
    stored = zip((a.divisors, *a.static), (b.divisors, *b.static), strict=True)
    return all(p is q or (p is not None and q is not None and torch.equal(p, q)) for p, q in stored)


def _in_order(parts: Sequence[Tiles]) -> bool:
    """Whether they are parts of one, each behind the last."""
    start = 0
    for part in parts:
        if part.within is not parts[0].within or part.start != start:
            return False
        start += part.codes.shape[0]
    return True

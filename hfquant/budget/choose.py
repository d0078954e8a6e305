"""Which option of every weight: an integer program (Lin et al., HAWQ-V3, arXiv:2011.10680, section 3.4, likewise).

    minimize  Σ loss·x    subject to  Σ bytes·x ≤ room,  Σ x = 1 for every unit,  x ∈ {0, 1}

or with bytes or seconds as what is minimized.  A unit is a weight, or several that have to have one grid.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from ..errors import RecipeError
from .table import Option, Row

GAP = 1e-4  # of the optimum that is left
SECONDS = 60.0  # after which the best so far has to do


@dataclass(frozen=True)
class Unit:
    """Weights that get one grid: for each option their bytes, loss and seconds together."""

    rows: tuple[Row, ...]
    options: tuple[tuple[Option, ...], ...]  # [option][row]
    nbytes: tuple[int, ...]
    data: tuple[int, ...]
    loss: tuple[float, ...]
    seconds: tuple[float, ...]


def units(rows: Sequence[Row], together: bool) -> list[Unit]:
    """One per weight, or per input; options that another beats in everything are left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        # the tensors of one fused-experts module have one name in recipes; what has no choice ties no others down
        key = row.inputs if together and row.kind != "experts" and len(row.options) > 1 else row.layer
        groups.setdefault(key, []).append(row)
    return [_unit(tuple(group)) for group in groups.values()]


def _unit(rows: tuple[Row, ...]) -> Unit:
    by_name = [{option.name: option for option in row.options} for row in rows]
    names = [name for name in by_name[0] if all(name in options for options in by_name)]
    options = [tuple(row[name] for row in by_name) for name in names]
    summed = [
        (
            sum(o.nbytes for o in some),
            sum(o.data for o in some),
            sum(o.loss for o in some),
            sum(o.seconds or 0.0 for o in some),
        )
        for some in options
    ]
    best = [
        i
        for i, one in enumerate(summed)
        if not any(_beats(other, one, j < i) for j, other in enumerate(summed) if j != i)
    ]
    nbytes, data, loss, seconds = zip(*(summed[i] for i in best), strict=True)
    return Unit(rows, tuple(options[i] for i in best), nbytes, data, loss, seconds)


def _beats(one: tuple[float, ...], other: tuple[float, ...], first: bool) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and (one != other or first)


def solve(units: Sequence[Unit], least: str, limits: Mapping[str, float]) -> list[int]:
    """The option of every unit.  least: what is minimized, "loss", "nbytes", "data" or "seconds".  limits: what these
    come to at most; nothing is ever over them.  Raises RecipeError if there is no such choice."""
    costs = {
        name: np.concatenate([np.asarray(getattr(unit, name), dtype=float) for unit in units])
        for name in ("nbytes", "data", "loss", "seconds")
    }
    for shrink in (0.0, 1e-7, 1e-6, 1e-5):  # a solver's tolerance is not ours
        chosen = _milp(units, costs, least, [(name, limit * (1 - shrink)) for name, limit in limits.items()])
        if chosen is None:
            break
        if all(total(units, chosen, name) <= limit for name, limit in limits.items()):
            return chosen
    said = " and ".join(f"{name} {limit:g}" for name, limit in limits.items())
    raise RecipeError(f"no choice of grids stays within {said}", "allow more, or add to `budget.bits`")


def total(units: Sequence[Unit], chosen: Sequence[int], name: str) -> float:
    """What a choice comes to."""
    return sum(getattr(unit, name)[i] for unit, i in zip(units, chosen, strict=True))


def _milp(
    units: Sequence[Unit], costs: dict[str, np.ndarray], least: str, limits: Sequence[tuple[str, float]]
) -> list[int] | None:
    counts = [len(unit.nbytes) for unit in units]
    ends = np.cumsum([0, *counts])
    one = csr_matrix((np.ones(ends[-1]), np.arange(ends[-1]), ends), shape=(len(units), ends[-1]))
    constraints = [LinearConstraint(one, 1, 1)]
    for name, limit in limits:
        scale = 1e4 / max(limit, 1e-30)
        constraints.append(LinearConstraint(costs[name][None] * scale, -np.inf, limit * scale))
    goal = costs[least] / max(float(np.median(costs[least])), 1e-30)
    with _aside():
        found = milp(
            goal, integrality=np.ones_like(goal), bounds=Bounds(0, 1), constraints=constraints,
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )  # fmt: skip
    if found.x is None:
        return None
    return [int(np.argmax(found.x[a:b])) for a, b in pairwise(ends)]


@contextmanager
def _aside() -> Iterator[None]:
    """HiGHS tells of some of its ways on stdout, which is for results: within, that is stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def frontier(units: Sequence[Unit]) -> list[tuple[int, float]]:
    """(bytes, loss) of the choices that are best for some price of a byte, from the smallest to the largest."""
    steps: list[tuple[float, int, float]] = []
    at_bytes, at_loss = 0, 0.0
    for unit in units:
        hull = _hull(sorted(zip(unit.nbytes, unit.loss, strict=True)))
        at_bytes, at_loss = at_bytes + hull[0][0], at_loss + hull[0][1]
        for (a, x), (b, y) in pairwise(hull):
            steps.append(((x - y) / (b - a), b - a, y - x))
    found = [(at_bytes, at_loss)]
    for _, more, change in sorted(steps, key=lambda step: -step[0]):
        at_bytes, at_loss = at_bytes + more, max(0.0, at_loss + change)
        found.append((at_bytes, at_loss))
    return found


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull, as far as it falls."""
    hull: list[tuple[int, float]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], point):
            hull.pop()
        if hull and hull[-1][0] == point[0]:
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / max(1, b[0] - a[0])

"""How far apart embeddings are, and where they lie: of the original, and of what compression made of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...model.trace import apart
from .statistics import mean_cosine, plane

SAME = 0.01  # relative distance: the type that embeddings are stored in may be another
TITLES = {"embeddings": "token embeddings", "hidden": "hidden states before the head"}


def compared(tables: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """One entry per kind of embedding and model.  tables: model -> kind -> float32 [n, d], the original first.

    Points of all models lie in the plane in which the first one's are spread the most, so that what moved shows as
    moved.  Embeddings that are the same in both models are told of once.
    """
    found: list[dict[str, Any]] = []
    first = next(iter(tables.values()))
    for kind, title in TITLES.items():
        if kind not in first or len(first[kind]) < 3:
            continue
        origin, directions = plane(first[kind])
        for model, kinds in tables.items():
            E = kinds[kind]
            if E is not first[kind] and apart(E, first[kind]) < SAME:
                continue
            points = (E.double() - origin) @ directions
            cosine = mean_cosine(E)
            found.append({"kind": kind, "what": title, "model": model, "cosine": cosine, "points": _rounded(points)})
    return found


def _rounded(points: Tensor) -> list[list[float]]:
    """To four digits of the largest: more cannot be seen."""
    step = float(points.abs().max().clamp(min=1e-30)) / 1e4
    return [[round(float(v) / step) * step for v in row] for row in points]

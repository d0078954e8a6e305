"""Curves and sums through a few measurements."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import nnls


class Line:
    """y ≥ 0 as a sum of non-negative multiples of some terms, fitted to a few measurements.

    whole: what y is a part of, by default y itself: errors count relative to it.
    """

    def __init__(
        self, rows: Sequence[Sequence[float]], y: Sequence[float], whole: Sequence[float] | None = None
    ) -> None:
        matrix, target = np.array(rows, dtype=float), np.array(y, dtype=float)
        size = np.array(y if whole is None else whole, dtype=float)
        weight = 1 / np.maximum(size, size.max() * 1e-3 + 1e-12)
        scale = np.maximum(matrix.max(0), 1e-12)
        found, _ = nnls(matrix / scale * weight[:, None], target * weight)
        self.terms = found / scale

    def __call__(self, *row: float) -> float:
        return float(self.terms @ np.array(row))


class Curve:
    """y of x, never falling: straight between measurements, constant before them, going on after them as it grew.

    What a product costs per row depends on how many there are, by a factor of ten from one to a hundred, so that no
    line fits.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        best: dict[float, float] = {}
        for x, y in points:
            best[x] = min(y, best.get(x, y))
        self.x = np.array(sorted(best))
        self.y = np.maximum.accumulate([best[x] for x in self.x])
        self.slope = self._end()

    def _end(self) -> float:
        """Of the last half: of two points that are near each other, noise would tell more than growth."""
        if len(self.x) < 2:
            return float(self.y[-1] / self.x[-1]) if self.x[-1] else 0.0
        i = int(np.searchsorted(self.x, self.x[-1] / 2, side="right")) - 1
        i = min(max(i, 0), len(self.x) - 2)
        return float((self.y[-1] - self.y[i]) / (self.x[-1] - self.x[i]))

    def __call__(self, x: float) -> float:
        if x > self.x[-1]:
            return float(self.y[-1] + self.slope * (x - self.x[-1]))
        return float(np.interp(x, self.x, self.y))

"""Which weights are kept: so many of every few in a row, or so many in all.

Scores are transposed, [in, out], as everything in `_obs.py`.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..tensors.encoding import Sparsity

MOST_M = 64


@dataclass(frozen=True)
class Places:
    """pattern (n, m): n of every m columns are kept; else the `sparsity`, a share, of all weights is pruned."""

    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None

    @property
    def prunes(self) -> bool:
        return self.pattern is not None or self.sparsity > 0

    def stride(self, block: int) -> int:
        """How many columns are decided on together, in blocks of about `block`."""
        return self.pattern[1] if self.pattern else block

    def choose(self, scores: Tensor, first: int = 0) -> Tensor:
        """bool [columns, out], True for the kept ones.  scores [columns, out], of the columns from `first` on.

        Shares are rounded so that all blocks of a weight together prune the share of the whole.
        """
        if self.pattern:
            return _highest_of_each(scores, *self.pattern)
        columns, out = scores.shape
        return _all_but(scores, self._pruned((first + columns) * out) - self._pruned(first * out))

    def stored(self, shape: tuple[int, int]) -> Sparsity:
        """How the places of a weight [out, in] are stored: a row that ends inside a pattern has none."""
        rows, columns = shape
        if self.pattern is None:
            return Sparsity(rows * columns - self._pruned(rows * columns))
        n, m = self.pattern
        return Sparsity(n, m) if columns % m == 0 else Sparsity(rows * (columns // m * n + min(n, columns % m)))

    def _pruned(self, weights: int) -> int:
        return round(self.sparsity * weights)


def read_pattern(text: str) -> tuple[int, int]:
    """`2of4` or `2:4` -> (2, 4).  Raises ValueError on anything else."""
    found = re.fullmatch(r"(\d+)(?:of|:)(\d+)", text)
    if not found:
        raise ValueError("a pattern is written `2of4`: two of every four weights in a row are kept")
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m <= MOST_M:
        raise ValueError(f"a pattern keeps at least one and not all of up to {MOST_M} weights, not {n} of {m}")
    return n, m


def _all_but(scores: Tensor, lowest: int) -> Tensor:
    """All except exactly so many of the lowest; of equal ones the first go.  What is not a number counts as highest.

    The limit is found by numpy, which moves no index along with every score, as torch's `topk` does.
    """
    flat = scores.flatten().nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not lowest:
        return torch.ones(scores.shape, dtype=torch.bool)
    limit = np.partition(flat.numpy(), lowest - 1)[lowest - 1]
    keep = flat > limit
    short = flat.numel() - lowest - int(keep.sum())
    if short:  # as many of those at the limit stay
        keep[(flat == limit).nonzero()[-short:]] = True
    return keep.view(scores.shape)


def _highest_of_each(scores: Tensor, n: int, m: int) -> Tensor:
    """n of every m rows of `scores`; of a shorter rest n, or all of it."""
    columns, out = scores.shape
    padded = torch.nn.functional.pad(scores, (0, 0, 0, -columns % m), value=-1.0).view(-1, m, out)
    keep = torch.zeros(padded.shape, dtype=torch.bool)
    keep.scatter_(1, padded.topk(n, dim=1, sorted=False).indices, True)
    return keep.view(-1, out)[:columns]

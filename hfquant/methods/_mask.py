"""Which weights are kept: the best `n` of every m in a row, or the best of all by count.

Scores are transposed here as in `_obs.py`, [in, out].
"""

import re

import torch
from torch import Tensor

MOST_M = 64  # of n:m: beyond, weights might as well lie anywhere


def read_pattern(text: str) -> tuple[int, int]:
    """`2of4` or `2:4` -> (2, 4), two kept of every four.  Raises ValueError on anything else."""
    found = re.fullmatch(r"(\d+)(?:of|:)(\d+)", text)
    if not found:
        raise ValueError("a pattern is written `2of4` or `'2:4'`: two kept of every four")
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m <= MOST_M:
        raise ValueError(f"a pattern keeps at least 1 and fewer than m of m ≤ {MOST_M} weights, not {n} of {m}")
    return n, m


def zeros_before(columns: int, rows: int, sparsity: float) -> int:
    """Weights pruned in the first `columns` columns, so that any number of blocks together prune what is asked."""
    return round(sparsity * rows * columns)


def best(scores: Tensor, pruned: int) -> Tensor:
    """bool like `scores`, False for exactly `pruned` of the lowest."""
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    if pruned:
        keep[scores.flatten().topk(pruned, largest=False, sorted=False).indices] = False
    return keep.view(scores.shape)


def best_of_each(scores: Tensor, n: int, m: int) -> Tensor:
    """bool like `scores` [in, out], True for the n highest of every m columns; of a shorter rest, n or all of it."""
    rows, out = scores.shape
    padded = torch.nn.functional.pad(scores, (0, 0, 0, -rows % m), value=-1.0).view(-1, m, out)
    keep = torch.zeros(padded.shape, dtype=torch.bool, device=scores.device)
    keep.scatter_(1, padded.topk(n, dim=1, sorted=False).indices, True)
    return keep.view(-1, out)[:rows]

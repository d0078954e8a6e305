"""A layer whose input is rounded too, in the integers it is made of.

With codes c of a weight row (scale s, zero point z) and q of a token (scale t, zero point y), over the columns that
share all four:   s·t · Σ (c − z)(q − y)   =   s·t · (Σ c·q − y·Σ c − z·Σ (q − y)).
The bracket is an integer and is computed as one: int8 x int8 -> int32 products, and sums of codes for the corrections.
Runs of columns that share less are one such product each, added up in float32.

The `fast` product (torch._int_mm) and the `exact` one (float64, below 2⁵³) return the same integers, and share what
follows: their results are equal bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..tensors.encoding import Activations
from ..tensors.layer import Quantized
from .reference import Matrix

Product = Callable[[Tensor, Tensor], Tensor]  # int8 [rows, n], int8 [out, n] -> int32 [rows, out], their exact product

MOST = 1 << 15  # columns whose Σ (c − z)(q − y), below 2¹⁶ each, cannot overflow an int32
EXACT = 1 << 10  # columns whose Σ c·q, at most 2¹⁴ each, is exact in float32


@dataclass(frozen=True)
class Run:
    """Columns a .. b of a weight, which share one scale in every row and in every token."""

    a: int
    b: int
    weight_group: int
    input_group: int
    codes: Tensor  # int8 [out, b − a]
    sums: Tensor  # int32 [out], of each row's codes
    zero: Tensor | None  # int32 [out], of the signed codes; None where it is 0 everywhere


@dataclass(frozen=True)
class Integers:
    """A weight [out, in] in runs of columns."""

    runs: tuple[Run, ...]
    scale: Tensor  # float32 [out, groups]

    @property
    def nbytes(self) -> int:
        tensors = [t for run in self.runs for t in (run.codes, run.sums, run.zero) if t is not None]
        return self.scale.nbytes + sum(t.nbytes for t in tensors)


def prepare(Q: Quantized, activations: Activations) -> Integers:
    """Q without a mask.  Signed codes are c − 2^(bits − 1): the zero point of a symmetric grid becomes 0."""
    grid, in_features = Q.grid, Q.shape[1]
    signed = (Q.codes.to(torch.int16) - grid.middle).to(torch.int8)
    zero = None if grid.symmetric else Q.zero_point.int() - grid.middle
    mine = grid.columns(in_features)
    theirs = min(activations.group_size, in_features) if activations.per == "group" else in_features
    runs = []
    for a, b in spans(in_features, mine, theirs):
        codes = signed[:, a:b].contiguous()
        sums = codes.sum(1, dtype=torch.int32)
        runs.append(Run(a, b, a // mine, a // theirs, codes, sums, None if zero is None else zero[:, a // mine]))
    return Integers(tuple(runs), Q.scale.float())


def spans(in_features: int, *widths: int) -> list[tuple[int, int]]:
    """The runs of columns between the borders of all groups, none longer than `MOST`."""
    cuts = sorted({0, in_features}.union(*(range(0, in_features, width) for width in (*widths, MOST))))
    return list(pairwise(cuts))


def linear(q: Tensor, scale: Tensor, zero: Tensor, matrix: Matrix, product: Product) -> Tensor:
    """x Wᵀ with the weights alone, for an x that is rounded.

    q int8 [rows, in], its codes; scale, zero float32 [rows, 1], [rows, groups] or [1], as `tensors.activations` has
    them.  Returns float32 [rows, out].
    """
    activations = matrix.encoding.activations
    assert activations is not None
    W: Integers = matrix.derive("integers", lambda: prepare(matrix.quantized().base.filled, activations))
    y = scale.new_zeros(q.shape[0], matrix.shape[0])
    whole, grouped = zero.to(torch.int32), activations.per == "group"
    for run in W.runs:
        mine = q[:, run.a : run.b].contiguous()
        shift = whole[:, run.input_group, None] if grouped else whole
        total = product(mine, run.codes)
        if not activations.symmetric:
            total -= shift * run.sums
        if run.zero is not None:
            total -= (mine.sum(1, dtype=torch.int32, keepdim=True) - (run.b - run.a) * shift) * run.zero
        if grouped:
            y += total.float().mul_(W.scale[:, run.weight_group]).mul_(scale[:, run.input_group, None])
        else:
            y.addcmul_(total.float(), W.scale[:, run.weight_group])
    return y if grouped else y.mul_(scale)


def exact(q: Tensor, codes: Tensor) -> Tensor:
    """q cᵀ in float64."""
    return (q.double() @ codes.double().T).to(torch.int32)


def fast(q: Tensor, codes: Tensor) -> Tensor:
    """q cᵀ with the machine's instructions for it, if it has them."""
    if q.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return torch._int_mm(q, codes.T)
    if q.device.type == "cuda" and not (q.shape[1] % 8 or codes.shape[0] % 8):
        rows = q.shape[0]  # cuBLAS wants more than 16
        return torch._int_mm(torch.nn.functional.pad(q, (0, 0, 0, max(0, 32 - rows))), codes.T)[:rows]
    # without such instructions the libraries' int8 products may saturate: float32, a few columns at a time
    pieces = zip(q.split(EXACT, 1), codes.split(EXACT, 1), strict=True)
    total = torch.zeros(q.shape[0], codes.shape[0], dtype=torch.int32, device=q.device)
    for mine, theirs in pieces:
        total += (mine.float() @ theirs.float().T).to(torch.int32)
    return total

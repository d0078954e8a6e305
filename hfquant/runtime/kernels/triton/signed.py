"""Signed codes of weights, as bytes or two to a byte: what 8-bit tensor cores read."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....tensors.encoding import Activations
from ....tensors.grid import Grid
from ....tensors.layer import Quantized
from .layout import CHUNK, ROWS

LEAST = 32  # columns of bytes that a tensor core multiplies at a time


@dataclass(frozen=True)
class Integers:
    """A weight [out, in] of signed codes c: scale[g, n] · (c − zero[g, n]).

    codes int8 [padded, columns], or uint8 [padded, columns/2] of two nibbles; scale, zero int16 [groups, padded], zero
    None where it is 0; sums int32 [blocks, padded], Σ (c − zero) of the columns that share all scales, None where x has
    no zero points.  group, span: columns that share a scale of the weight, and of x; 0: all.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None
    group: int
    span: int
    unit: int
    shape: tuple[int, int]

    @property
    def nibbles(self) -> bool:
        return self.codes.dtype == torch.uint8

    @property
    def columns(self) -> int:
        """With padding: of the codes of x."""
        return self.codes.shape[1] * (2 if self.nibbles else 1)

    @property
    def whole(self) -> bool:
        """Whether one sum of integers makes each result."""
        return not self.group and not self.span

    @property
    def nbytes(self) -> int:
        tensors = [t for t in (self.codes, self.scale, self.zero, self.sums) if t is not None]
        return sum(t.nbytes for t in tensors)


def spans(in_features: int, grid: Grid, activations: Activations) -> tuple[int, int, int]:
    """(group, span, unit): what shares a scale (0: all), and the columns multiplied between two changes of it."""
    group = grid.columns(in_features)
    span = min(activations.group_size, in_features) if activations.per == "group" else in_features
    group, span = (0 if width == in_features else width for width in (group, span))
    both = group | span  # its lowest bit is that of the greatest power of two that divides both
    return group, span, min(both & -both, 128) if both else 128


def prepare(Q: Quantized, activations: Activations) -> Integers:
    """Q without a mask, whose unit is at least `LEAST`."""
    grid, (rows, in_features) = Q.grid, Q.shape
    group, span, unit = spans(in_features, grid, activations)
    nibbles = grid.bits <= 4 and unit >= 2 * LEAST
    step = unit if group or span else 256
    columns = -(-in_features // step) * step
    more = -rows % ROWS
    zero = None if grid.symmetric else F.pad(Q.zero_point.T.to(torch.int16) - grid.middle, (0, more)).contiguous()
    made, counted = [], []
    for part, zeros in zip(
        Q.codes.split(max(1, CHUNK // columns)), Q.zero_point.split(max(1, CHUNK // columns)), strict=True
    ):
        signed = F.pad(part.to(torch.int16) - grid.middle, (0, columns - in_features))
        made.append(_nibbles(signed, unit) if nibbles else signed.to(torch.int8))
        if not activations.symmetric:
            centred = part.to(torch.int32) - grid.expand(zeros.int(), in_features)
            blocks = F.pad(centred, (0, columns - in_features)).unflatten(1, (-1, unit if group or span else columns))
            counted.append(blocks.sum(2, dtype=torch.int32))
    sums = F.pad(torch.cat(counted).T, (0, more)).contiguous() if counted else None
    codes = F.pad(torch.cat(made), (0, 0, 0, more))
    scale = F.pad(Q.scale.T, (0, more)).contiguous()
    return Integers(codes, scale, zero, sums, group, span, unit, (rows, in_features))


def _nibbles(signed: Tensor, unit: int) -> Tensor:
    """int16 [rows, columns] in −8..7 -> uint8 [rows, columns/2]: halves of a unit share a byte."""
    first, second = (signed + 8).unflatten(1, (-1, 2, unit // 2)).to(torch.uint8).unbind(2)
    return (first | second << 4).flatten(1)

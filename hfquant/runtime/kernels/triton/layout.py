"""Planar-16: how codes of 2 to 8 bits lie in memory for tensor cores, and the way there from what a format stores.

A code is split into planes of 4, 2 and 1 bits (`tensors.packing.planes`), the low one first.  A plane of width w holds
16/w fields in each int16 word.  Within a block of `field`·16/w columns, field j of word i is column j·field + i: the
words of a row, shifted and masked once, are `field` neighbouring columns.  So a kernel multiplies each field with a
plain slice of x, and nothing is interleaved.

A row is its planes one after the other; rows are padded to a multiple of `ROWS`, columns to a multiple of `step`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....tensors.grid import Grid
from ....tensors.layer import Quantized
from ....tensors.packing import planes

ROWS = 128  # the most output features that one program computes
WORD = 16
LEAST = 16  # columns: what a tensor core multiplies at a time
CHUNK = 1 << 22  # weights packed at a time


@dataclass(frozen=True)
class Layout:
    """field: columns of a field.  unit: columns that share a scale, a multiple of `field` and divisor of `step`."""

    bits: int
    field: int
    unit: int

    @property
    def step(self) -> int:
        """Columns after which all planes begin a block."""
        return WORD // min(planes(self.bits)) * self.field

    def columns(self, in_features: int) -> int:
        """With padding."""
        return -(-in_features // self.step) * self.step


def unit(grid: Grid, in_features: int) -> int | None:
    """The columns, a power of two, that share a scale wherever one begins at a multiple of them; None if too few."""
    columns = grid.columns(in_features)
    most = 256 if grid.groups(in_features) == 1 else columns & -columns
    return min(most, 256) if most >= LEAST else None


def layout(bits: int, unit: int) -> Layout:
    """Fields as wide as a unit allows, but such that a step is no longer than 512 columns."""
    field = min(unit, 64 if min(planes(bits)) == 4 else 32)
    return Layout(bits, field, min(unit, WORD // min(planes(bits)) * field))


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 [out, in] -> int16 [out', columns·bits/16]"""
    rows, in_features = codes.shape
    columns = layout.columns(in_features)
    packed = torch.empty(-(-rows // ROWS) * ROWS, columns * layout.bits // WORD, dtype=torch.int16, device=codes.device)
    packed[rows:] = 0
    step = max(1, CHUNK // columns)
    for a in range(0, rows, step):
        part = F.pad(codes[a : a + step], (0, columns - in_features))
        packed[a : min(a + step, rows)] = torch.cat(list(_pack_planes(part, layout)), 1)
    return packed


def _pack_planes(codes: Tensor, layout: Layout) -> Iterator[Tensor]:
    """uint8 [rows, columns] -> int16 [rows, columns·width/16] for each plane."""
    shift = 0
    for width in planes(layout.bits):
        fields = (codes >> shift & (2**width - 1)).unflatten(1, (-1, WORD // width, layout.field))
        words = fields[:, :, 0].to(torch.int16)
        for j in range(1, WORD // width):
            words |= fields[:, :, j].to(torch.int16) << (j * width)
        yield words.flatten(1)
        shift += width


def unpack(packed: Tensor, layout: Layout, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: uint8 [out, in]."""
    codes = torch.zeros(shape[0], layout.columns(shape[1]), dtype=torch.uint8, device=packed.device)
    at = shift = 0
    for width in planes(layout.bits):
        size = codes.shape[1] * width // WORD
        words = packed[: shape[0], at : at + size].int().unflatten(1, (-1, layout.field))
        fields = codes.unflatten(1, (-1, WORD // width, layout.field))
        for j in range(WORD // width):
            fields[:, :, j] |= (words >> (j * width) & (2**width - 1)).to(torch.uint8) << shift
        at, shift = at + size, shift + width
    return codes[:, : shape[1]]


@dataclass(frozen=True)
class Weights:
    """A weight [out, in] as the kernels read it: scale[g, n] · (code[n, k] − zero[g, n]), g = k // group."""

    words: Tensor  # int16 [out', columns·bits/16]
    scale: Tensor  # [groups, out'] in the type it is stored in
    zero: Tensor | None  # int16 [groups, out']; None: the middle code everywhere
    layout: Layout
    group: int  # columns that share a scale
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)


def weights(Q: Quantized) -> Weights:
    """Q without a mask, on a grid whose groups have a unit."""
    grid, (rows, in_features) = Q.grid, Q.shape
    least = unit(grid, in_features)
    assert least is not None, "refused before"
    chosen = layout(grid.bits, least)
    padding = (0, -rows % ROWS)
    return Weights(
        words=pack(Q.codes, chosen),
        scale=F.pad(Q.scale.T, padding).contiguous(),
        zero=None if grid.symmetric else F.pad(Q.zero_point.T.to(torch.int16), padding).contiguous(),
        layout=chosen,
        group=grid.columns(in_features),
        shape=(rows, in_features),
    )


def bytes_per_weight(grid: Grid, in_features: int) -> float:
    """What is read of memory for each weight, for estimates."""
    per_group = 2 + (0 if grid.symmetric else 2)
    return grid.bits / 8 + per_group * grid.groups(in_features) / max(in_features, 1)

"""Planar-16: how codes of 2 to 8 bits lie in memory for tensor cores, and the way there from what a format stores.

A code is split into planes of 4, 2 and 1 bits (`tensors.packing.planes`), the low one first.  A plane of width w holds
16/w fields in each int16 word.  Within a block of `field`·16/w columns, field j of word i is column j·field + i: the
words of a row, shifted and masked once, are `field` neighbouring columns.  So a kernel multiplies each field with a
plain slice of x, and nothing is interleaved.

A row is its planes one after the other; rows are padded to a multiple of `ROWS`, columns to a multiple of `step`.
"""

import math
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
class Plane:
    """Bits `shift` .. `shift + width − 1` of every code.  field: columns that one field of a word row covers."""

    width: int
    shift: int
    field: int

    @property
    def block(self) -> int:
        """Columns whose words lie together."""
        return WORD // self.width * self.field


@dataclass(frozen=True)
class Layout:
    """The planes of a width, for scales that hold for `unit` columns or a multiple of them."""

    bits: int
    unit: int
    planes: tuple[Plane, ...]

    @property
    def step(self) -> int:
        """Columns after which all planes begin a block."""
        return max(plane.block for plane in self.planes)

    def columns(self, in_features: int) -> int:
        """With padding."""
        return -(-in_features // self.step) * self.step


def unit(grid: Grid, in_features: int) -> int | None:
    """The columns, a power of two, that share a scale wherever one begins at a multiple of them; None if too few."""
    columns = grid.columns(in_features)
    most = 256 if grid.groups(in_features) == 1 else columns & -columns
    return min(most, 256) if most >= LEAST else None


def layout(bits: int, unit: int) -> Layout:
    """Fields as wide as a unit allows: at 4 bits up to 64 columns, which is a whole cache line of words."""
    found, shift = [], 0
    for width in planes(bits):
        found.append(Plane(width, shift, max(LEAST, min(unit, 16 * width))))
        shift += width
    step = max(plane.block for plane in found)
    return Layout(bits, min(unit, step), tuple(found))


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 [out, in] -> int16 [out', columns·bits/16]"""
    rows, in_features = codes.shape
    columns = layout.columns(in_features)
    packed = torch.empty(-(-rows // ROWS) * ROWS, columns * layout.bits // WORD, dtype=torch.int16, device=codes.device)
    packed[rows:] = 0
    step = max(1, CHUNK // columns)
    for a in range(0, rows, step):
        part = F.pad(codes[a : a + step], (0, columns - in_features))
        packed[a : min(a + step, rows)] = torch.cat([_pack_plane(part, plane) for plane in layout.planes], 1)
    return packed


def _pack_plane(codes: Tensor, plane: Plane) -> Tensor:
    """uint8 [rows, columns] -> int16 [rows, columns·width/16]"""
    count = WORD // plane.width
    fields = (codes >> plane.shift & (2**plane.width - 1)).unflatten(1, (-1, count, plane.field))
    words = fields[:, :, 0].to(torch.int16)
    for j in range(1, count):
        words |= fields[:, :, j].to(torch.int16) << (j * plane.width)
    return words.flatten(1)


def unpack(packed: Tensor, layout: Layout, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: uint8 [out, in]."""
    codes = torch.zeros(shape[0], layout.columns(shape[1]), dtype=torch.uint8, device=packed.device)
    at = 0
    for plane in layout.planes:
        size = codes.shape[1] * plane.width // WORD
        words = packed[: shape[0], at : at + size].int().unflatten(1, (-1, plane.field))
        for j in range(WORD // plane.width):
            field = (words >> (j * plane.width) & (2**plane.width - 1)).to(torch.uint8)
            codes.unflatten(1, (-1, WORD // plane.width, plane.field))[:, :, j] |= field << plane.shift
        at += size
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


def fits(grid: Grid, in_features: int) -> bool:
    return unit(grid, in_features) is not None and 2 <= grid.bits <= 8 and math.isfinite(in_features)

"""Launches the kernel of `integers`: a layer whose input is rounded too."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....tensors.encoding import Activations
from ....tensors.layer import Quantized
from . import counters, integers
from .configs import Config, choose, gpu
from .layout import CHUNK, ROWS
from .tokens import Rounded

LEAST = 32  # columns of bytes that a tensor core multiplies at a time
BAND = 8  # blocks of rows that follow each other


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


def spans(Q: Quantized, activations: Activations) -> tuple[int, int, int]:
    """(group, span, unit): what shares a scale (0: all), and the columns multiplied between two changes of it."""
    in_features = Q.shape[1]
    group = Q.grid.columns(in_features)
    span = min(activations.group_size, in_features) if activations.per == "group" else in_features
    group, span = (0 if width == in_features else width for width in (group, span))
    both = group | span  # its lowest bit is that of the greatest power of two that divides both
    return group, span, min(both & -both, 128) if both else 128


def prepare(Q: Quantized, activations: Activations) -> Integers:
    """Q without a mask, whose unit is at least `LEAST`."""
    grid, (rows, in_features) = Q.grid, Q.shape
    group, span, unit = spans(Q, activations)
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


def rounded(
    x: Rounded,
    W: Integers,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    config: Config | None = None,
    join: str = "last",
    asm: bool = True,
) -> Tensor:
    """[rows, out] in `dtype`.  x: its codes have `W.columns` columns.  bias [padded].  join, asm: as in `linear`."""
    rows, (outs, _) = x.codes.shape[0], W.shape
    # where nothing changes between them, units may be longer
    unit = W.unit if not W.whole or W.nibbles else 256 if rows <= 16 else 128
    if config is None:
        kernel = "nibbles" if W.nibbles else "bytes"
        config = choose(gpu(x.codes.device), kernel, 4 if W.nibbles else 8, rows, W.shape, W.columns // unit)
    y = torch.empty(rows, outs, dtype=dtype, device=x.codes.device)
    padded = W.codes.shape[0]
    tiles = -(-outs // config.outs), -(-rows // config.rows)
    stride = x.scale.stride(0) if x.scale.shape[0] > 1 else 0
    sums = torch.int32 if W.whole else torch.float32
    partial, count, join = counters.meeting(x.codes.device, sums, config.split, tiles[0] * tiles[1], (rows, padded), join)
    sizes = {"SPAN": W.span, "ROWS": config.rows, "OUTS": config.outs}
    integers.rounded[(tiles[0] * tiles[1], config.split)](
        x.codes,
        x.scale,
        x.zero,
        W.codes,
        W.scale,
        W.zero,
        W.sums,
        y,
        bias,
        partial,
        count,
        rows,
        outs,
        padded,
        W.columns,
        stride,
        W.scale.shape[0],
        x.scale.shape[1],
        GROUP=W.group,
        UNIT=unit,
        NIBBLES=W.nibbles,
        BAND=BAND,
        SPLIT=config.split,
        JOIN=join,
        ASM=asm and not integers.INTERPRETED.value,
        num_warps=config.warps,
        num_stages=config.stages,
        **sizes,
    )
    if config.split > 1 and join != "last":
        integers.join_rounded[tiles](
            partial,
            x.scale,
            x.zero,
            W.scale,
            W.sums,
            y,
            bias,
            rows,
            outs,
            padded,
            stride,
            WHOLE=W.whole,
            SPLIT=1 if join == "atomic" else config.split,
            **sizes,
        )
    return y

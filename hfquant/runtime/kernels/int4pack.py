"""torch's 4-bit kernel for few rows on a CPU, for every width, group size and shape.

The kernel computes Σₖ x[k] · (scale[g] · (q[k] − 8) + offset[g]) with q in 0..15, groups g of 32, 64, 128 or
256 columns, rows in multiples of 16, everything but the accumulator in bfloat16.  So:

  2, 3 bits   q = code + 8 − zero_point fits into 0..15, and the offset is 0
  4 bits      q = code, offset = scale · (8 − zero_point)
  5..8 bits   code = 16·high + low: the two halves stand side by side along `in`, x is repeated, and one call
              adds both up.  The offset is split over the halves, which makes it exact.
  groups      a scale is repeated over the kernel's smaller groups; a group of odd size is padded, x with it

What differs from the reference: scales are rounded to bfloat16 (as the reference rounds the weights), and at
4 bits the offset of an asymmetric grid is rounded too.  `tests/runtime/kernels/test_int4pack.py` states the bound.

Memory: 4 bits per weight up to 4 bits, 8 above, plus 32 bits per kernel group, beside the packed parameters,
which stay as they are so that they can be saved again.  A 4-bit model of group 64 holds 4.25 + 4.5 bits per
weight, about half of bfloat16; an 8-bit one about as much as bfloat16.

float16 and float32 activations are rounded to bfloat16 on the way in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tensors.grid import Grid
from ...tensors.layer import Quantized
from ..extras import after, before
from ..reference import Matrix

GROUPS = (256, 128, 64, 32)  # columns that may share a scale in the kernel
ROWS = 16  # out_features the kernel handles together
CHUNK = 1 << 22  # weights converted at a time; a multiple of 64 rows, the kernel's blocks
# rows of x up to which the kernel beats decoding the weight once for all of them, by number of halves
MAX_ROWS = {1: 64, 2: 32}


@dataclass(frozen=True)
class Pack:
    """A weight as the kernel wants it, and how x must be laid out to meet it."""

    weight: Tensor  # uint8 [out', in'/2]
    scale_and_offset: Tensor  # bfloat16 [in'/group, out', 2]
    group: int
    halves: int
    columns: tuple[int, int] | None  # a group's columns, and with its padding; None if groups are not padded
    padding: int  # columns after the last group
    out_features: int

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale_and_offset.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x bfloat16 [tokens, in] -> [tokens, out]"""
        x = self.lay_out(x)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group, self.scale_and_offset)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features].contiguous()

    def lay_out(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, in']"""
        if self.padding:
            x = F.pad(x, (0, self.padding))
        if self.columns is not None:
            short, long = self.columns
            x = F.pad(x.unflatten(1, (-1, short)), (0, long - short)).flatten(1)
        return torch.cat([x] * self.halves, 1) if self.halves > 1 else x.contiguous()


def halves(bits: int) -> int:
    """4-bit parts of a code."""
    return 1 if bits <= 4 else 2


def kernel_groups(grid: Grid, in_features: int) -> tuple[int, tuple[int, int] | None, int]:
    """The kernel's group size, the padding of each group, and the padding after the last one."""
    columns = grid.columns(in_features)
    whole = math.gcd(columns, in_features)
    if whole % GROUPS[-1] == 0:
        return _largest(whole), None, 0
    if grid.groups(in_features) == 1:
        return GROUPS[-1], None, -in_features % GROUPS[-1]
    if columns % GROUPS[-1] == 0:
        return GROUPS[-1], None, -in_features % GROUPS[-1]
    padded = columns + -columns % GROUPS[-1]
    return _largest(padded), (columns, padded), -in_features % columns


def _largest(columns: int) -> int:
    return next(group for group in GROUPS if columns % group == 0)


def prepare(Q: Quantized) -> Pack:
    """The kernel's form of a weight."""
    (out_features, in_features), grid = Q.shape, Q.grid
    group, columns, padding = kernel_groups(grid, in_features)
    scale = Q.scale.float().to(torch.bfloat16).float()
    zero = Q.zero_point.float()
    codes = F.pad(Q.codes, (0, padding))
    if columns is not None:
        codes = F.pad(codes.unflatten(1, (-1, columns[0])), (0, columns[1] - columns[0])).flatten(1)
    width = columns[1] if columns is not None else grid.columns(in_features) + (padding if scale.shape[1] == 1 else 0)
    repeat, count = width // group, codes.shape[1] // group
    scale, zero = (t.repeat_interleave(repeat, 1)[:, :count] for t in (scale, zero))
    if grid.bits < 4:  # |code − zero_point| < 8: no offset
        shift = (8 - zero).to(torch.uint8).repeat_interleave(group, 1)
        parts = [(codes + shift, scale, torch.zeros_like(scale))]
    elif grid.bits == 4:
        parts = [(codes, scale, scale * (8 - zero))]
    else:
        offset = scale * (128 + 8 - zero)
        high = offset.to(torch.bfloat16).float()
        parts = [(codes >> 4, 16 * scale, high), (codes & 15, scale, offset - high)]
    return Pack(
        weight=_convert(torch.cat([part[0] for part in parts], 1)),
        scale_and_offset=_interleave(
            torch.cat([part[1] for part in parts], 1), torch.cat([part[2] for part in parts], 1)
        ),
        group=group,
        halves=len(parts),
        columns=columns,
        padding=padding,
        out_features=out_features,
    )


def _convert(codes: Tensor) -> Tensor:
    """uint8 [out, in'] -> the kernel's layout, uint8 [out', in'/2], a few rows at a time (it wants int32)."""
    step = max(64, CHUNK // codes.shape[1] // 64 * 64)
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            F.pad(rows, (0, 0, 0, -rows.shape[0] % ROWS)).to(torch.int32), 1
        )
        for rows in codes.split(step)
    ]
    return torch.cat(packed)


def _interleave(scale: Tensor, offset: Tensor) -> Tensor:
    """[out, groups] twice -> bfloat16 [groups, out', 2]"""
    both = torch.stack([scale.T, offset.T], -1).to(torch.bfloat16)
    return F.pad(both, (0, 0, 0, -both.shape[1] % ROWS)).contiguous()


class Int4Pack:
    name = "int4pack"
    rank = 60
    exact = False  # scales are rounded to bfloat16, and x if it is not

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is not None:
            return "inputs are rounded to integers"
        if matrix.encoding.grid.is_float:
            return "weights are not quantized"
        if x.device.type != "cpu":
            return f"for CPUs, not {x.device.type}"
        if x.dtype == torch.float64:
            return "inputs of 64 bits would be rounded to 16"
        if x.shape[0] > MAX_ROWS[halves(matrix.encoding.grid.bits)]:
            return f"{x.shape[0]} rows: decoding the weight once is faster"
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return f"no vectorised 4-bit kernel for {torch.backends.cpu.get_cpu_capability()}"
        if not matrix.trackable:
            return "weights made under torch.inference_mode: a change of them could not be noticed"
        return None

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        pack: Pack = matrix.derive("int4pack", lambda: prepare(matrix.quantized().base.filled))
        x = before(x, matrix)
        return after(pack(x.to(torch.bfloat16)).to(x.dtype), x, matrix, bias)


KERNEL = Int4Pack()

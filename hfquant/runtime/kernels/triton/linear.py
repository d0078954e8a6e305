"""Launches the kernel of `device.planes`: y = x Ŵᵀ (+ bias, + low-rank correction) for 16-bit x."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....tensors.layer import LowRank as Factors
from . import counters
from .configs import Config, choose, gpu
from .device import planes
from .device.fields import INTERPRETED
from .layout import Weights

RANKS = (16, 32, 64)  # what a program adds itself; a larger correction is two products more


@dataclass(frozen=True)
class LowRank:
    """y += ((x Vᵀ) · scale) Uᵀ, in the type of x.  u [padded, r'], v [r', in], scale [r'], r' one of RANKS."""

    u: Tensor
    v: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.u.nbytes + self.v.nbytes + self.scale.nbytes

    def inner(self, x: Tensor) -> Tensor:
        """[rows, r']"""
        return F.linear(x, self.v).mul_(self.scale)


def linear(
    x: Tensor,
    W: Weights,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    config: Config | None = None,
    join: str = "last",
    dtype: torch.dtype | None = None,
    asm: bool = True,
) -> Tensor:
    """[rows, out] in `dtype`, that of x if there is none.

    x [rows, in] bfloat16 or float16, contiguous, on the device of W; bias [out].  join: how sums
    split over columns meet, see `device.splits`; asm: whether codes are taken apart in PTX or in Triton's own
    operations.
    """
    (outs, in_features), rows = W.shape, x.shape[0]
    steps = W.layout.columns(in_features) // W.layout.step
    if config is None:
        config = choose(gpu(x.device), "planes", W.layout.bits, rows, W.shape, steps)
    y = torch.empty(rows, outs, dtype=dtype or x.dtype, device=x.device)
    tail = (bias, low_rank and low_rank.u, low_rank and low_rank.inner(x))
    sizes = {"RANK": low_rank.u.shape[1] if low_rank else 0, "ROWS": config.rows, "OUTS": config.outs}
    padded = W.words.shape[0]
    grid = (-(-outs // config.outs), config.split, -(-rows // config.rows))
    partial, count, join = counters.meeting(
        x.device, torch.float32, config.split, grid[0] * grid[2], (rows, padded), join
    )
    planes.linear[grid](
        x,
        W.words,
        W.scale,
        W.zero,
        y,
        *tail,
        partial,
        count,
        rows,
        outs,
        padded,
        in_features,
        steps,
        BITS=W.layout.bits,
        FIELD=W.layout.field,
        UNIT=W.layout.unit,
        GROUP=W.group,
        TAIL=steps * W.layout.step != in_features,
        SPLIT=config.split,
        JOIN=join,
        ASM=asm and not INTERPRETED.value,
        **sizes,
        **config.options,
    )
    if config.split > 1 and join != "last":
        shares = 1 if join == "atomic" else config.split
        planes.join[grid[::2]](partial, y, *tail, rows, outs, padded, SPLIT=shares, **sizes, **config.options)
    return y


def low_rank(factors: Factors, W: Weights, dtype: torch.dtype) -> LowRank | None:
    """As the kernels read it; None if its rank is too large for them."""
    rank = next((r for r in RANKS if r >= factors.rank), None)
    if rank is None:
        return None
    more = rank - factors.rank
    return LowRank(
        u=F.pad(factors.u.to(dtype), (0, more, 0, W.words.shape[0] - factors.u.shape[0])),
        v=F.pad(factors.v.to(dtype), (0, 0, 0, more)),
        scale=F.pad(factors.scale.to(dtype), (0, more)),
    )

"""SparseGPT's sweep (algorithm 1 of the paper): which weights go is decided on the way, what they lose is passed on."""

import torch
from torch import Tensor

from ..tensors.grid import Grid
from ..tensors.layer import Quantized
from ._mask import Places
from ._obs import sweep


class Rounding:
    """Rounds the kept weights of columns that come one after the other, and collects their codes.

    Grids are fitted beforehand, to those weights that would be kept if no column had been touched yet: a group may be
    wider than the block in which it is known what stays.
    """

    def __init__(
        self,
        Wt: Tensor,
        U: Tensor,
        diagonal: Tensor,
        places: Places,
        block: int,
        grid: Grid,
        scale_dtype: torch.dtype,
    ) -> None:
        n, stride = Wt.shape[0], places.stride(block)
        saliency = Wt.square() / U.diagonal().square()[:, None]
        keep = torch.cat([places.choose(saliency[j : j + stride], j) for j in range(0, n, stride)])
        self.grid, self.columns = grid, grid.columns(n)
        self.scale, self.zero = grid.fit((Wt * keep).T, diagonal, search=0, dtype=scale_dtype)
        self._S, self._Z = self.scale.float().T.contiguous(), self.zero.float().T.contiguous()  # [groups, out]
        self._codes = torch.empty(Wt.shape, dtype=torch.uint8)

    def __call__(self, j: int, w: Tensor, keep: Tensor) -> Tensor:
        """Column j [out] on the grid, zero where it is not kept."""
        S, Z = self._S[j // self.columns], self._Z[j // self.columns]
        code = torch.where(keep, (w / S).add_(Z).round_().clamp_(0, self.grid.top), Z)
        self._codes[j] = code
        return code.sub_(Z).mul_(S)

    def quantized(self) -> Quantized:
        return Quantized(codes=self._codes.T.contiguous(), scale=self.scale, zero_point=self.zero, grid=self.grid)


def prune(Wt: Tensor, U: Tensor, places: Places, block: int, rounding: Rounding | None = None) -> tuple[Tensor, Tensor]:
    """Wt [in, out], U [in, in] from `inverse_factor` -> V [in, out] and which of it are kept, bool."""
    stride = places.stride(block)
    cost = U.diagonal().square()[:, None]
    keep = torch.empty(Wt.shape, dtype=torch.bool)

    def project(j: int, W: Tensor) -> Tensor:
        if j % stride == 0:
            keep[j : j + stride] = places.choose(W[j : j + stride].square() / cost[j : j + stride], j)
        return W[j] * keep[j] if rounding is None else rounding(j, W[j], keep[j])

    # columns that are decided on together must all be as corrected so far: no block of the sweep ends among them
    return sweep(Wt, U, project, max(1, block // stride) * stride), keep

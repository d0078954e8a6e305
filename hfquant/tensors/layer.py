"""What the methods pass to each other: one linear layer on its way from W to its packed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A weight on its grid.  codes uint8 [out, in]; scale [out, groups]; zero_point uint8 [out, groups]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in]"""
        return self.grid.decode(self.codes, self.scale, self.zero_point)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix and what is known about it; a method is Layer -> Layer.

    name: module path in the model.  W float32 [out, in], as trained.  H float32 [in, in] = 2/n · XXᵀ over the
    calibration tokens (any positive factor gives the same result).  C float32 [in, in] = 2/n · X̃Xᵀ where X̃ is
    the input the layer had in the original model; None where only one stream was run.
    """

    name: str
    W: Tensor
    H: Tensor | None = None
    C: Tensor | None = None
    Q: Quantized | None = None
    notes: tuple[str, ...] = ()

    @property
    def effective(self) -> Tensor:
        """The weight that will run, float32 [out, in]."""
        return self.W if self.Q is None else self.Q.dequantize()

    def error(self) -> float:
        """‖(W − Ŵ)X‖ / ‖WX‖; without H, ‖W − Ŵ‖ / ‖W‖."""
        D = self.W - self.effective
        lost, whole = (_energy(D, self.H), _energy(self.W, self.H))
        return float((lost / whole.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).sqrt())


def _energy(A: Tensor, H: Tensor | None) -> Tensor:
    """tr(A H Aᵀ)"""
    return A.square().sum() if H is None else ((A @ H) * A).sum()

"""LoRC, low-rank compensation (ZeroQuant-V2; Yao et al., 2023; arXiv:2303.08302, section 5), in the layer's metric.

What a weight lacks after any rounding or pruning, E = W − Ŵ, is approximated by U V of rank r, which runs beside it:
y = Ŵx + U(Vx).  Where the steps before aim at shifted weights W*, to match the original model, E = W* − Ŵ.

The paper takes the SVD of E, which is best for ‖E − UV‖.  What the layer puts out is best with ‖(E − UV)X‖: with
H = XXᵀ = L Lᵀ that is the SVD of E·L = A Σ Bᵀ, and U = A_r, V = Σ_r B_rᵀ L⁻¹ = A_rᵀ E (QERA; Zhang et al., 2024;
arXiv:2410.06040, theorem 1).  L only serves to find the r directions A_r of the output that lose most.

Both factors are stored in 8 bit, a scale per rank.  V is solved for after U has been rounded, so that it makes up for
that too: V = (UᵀU)⁻¹UᵀE, whatever H is.
"""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..tensors.encoding import Encoding
from ..tensors.grid import Grid
from ..tensors.layer import Layer, LowRank
from ._obs import MOST_DAMP, damped
from ._spectrum import leading

TOP = 127  # of int8, used symmetrically


class Method(BaseModel):
    """Options of LoRC."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(8, ge=0, description="of the correction; 0 = as long as a rank pays more than its bytes in bits")
    most: int = Field(64, ge=1, description="the largest rank that `rank: 0` may choose")
    weighted: bool = Field(True, description="least error of the layer's output; false: of the weight, as in the paper")
    damp: float = Field(0.01, ge=0, le=1, description="λ as a fraction of mean(diag H), where `weighted`")

    kind: ClassVar[str] = "compensate"
    rowwise: ClassVar[bool] = False  # all rows share V
    experts: ClassVar[bool] = False  # as many V as experts

    @property
    def needs_hessian(self) -> bool:
        return self.weighted

    @classmethod
    def shorthand(cls, what: str) -> dict[str, Any]:
        """`r8`, or `auto` for a searched rank."""
        if what == "auto":
            return {"rank": 0}
        if not what.startswith("r") or not what[1:].isdecimal() or int(what[1:]) == 0:
            raise ValueError("write the rank, e.g. `lorc-r8`, or `lorc-auto`")
        return {"rank": int(what[1:])}

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if the rank is larger than the weight [out, in] can have."""
        if self.rank > min(shape):
            raise ValueError(f"a weight of {shape[0]} x {shape[1]} has no more than rank {min(shape)}, not {self.rank}")

    def encodes(self, encoding: Encoding, shape: tuple[int, int]) -> Encoding:
        """What it adds to how a weight [out, in] is stored; of a searched rank, at most."""
        return replace(encoding, rank=self.rank or min(self.most, *shape))

    def __call__(self, layer: Layer, grid: Grid, scale_dtype: torch.dtype) -> Layer:
        """Set `low_rank`, unless it would not lower the layer's error."""
        E = layer.lost.double()
        H = layer.H if self.weighted and layer.H is not None and torch.isfinite(layer.H).all() else None
        L = None if H is None else factor(H, self.damp)
        A, energy = leading(E if L is None else E @ L, self.rank or min(self.most, *E.shape))
        rank = self.rank or paying(energy, E.shape)
        notes = layer.notes if L is not None or not self.weighted else (*layer.notes, "no usable Hessian: plain SVD")
        if rank == 0:
            return replace(layer, notes=(*notes, "no rank pays for itself: no correction"))
        corrected = replace(layer, low_rank=factors(E, A[:, :rank]), notes=notes)
        if corrected.error() < layer.error():
            return corrected
        return replace(layer, notes=(*notes, "a correction does not lower the error: left out"))


def factor(H: Tensor, damp: float) -> Tensor | None:
    """Lower Cholesky factor L of H + λI = L Lᵀ in float64; None if no damping makes it positive definite."""
    while damp <= MOST_DAMP:
        L, failed = torch.linalg.cholesky_ex(damped(H, damp))
        if not failed:
            return L
        damp = max(10 * damp, 1e-4)
    return None


def paying(energy: Tensor, shape: tuple[int, ...]) -> int:
    """How many ranks lower the error more than their bytes would as a finer grid.

    energy [ranks + 1]: squared error left with 0, 1, 2 .. ranks.  One bit more for every weight divides it by 4; a rank
    in 8 bit costs (out + in) · 8 / (out · in) bits per weight, and has to do as much.
    """
    out, n = shape
    needed = math.log(4) * 8 * (out + n) / (out * n)
    gains = -torch.diff(energy.clamp(min=torch.finfo(energy.dtype).tiny).log())
    return int((gains >= needed).long().cumprod(0).sum())


def factors(E: Tensor, A: Tensor) -> LowRank:
    """E ≈ U V in 8 bit, given the directions of the columns of U.  E float64 [out, in], A float64 [out, rank]"""
    u, su = _int8(A.T)
    U = u.T * su
    v, sv = _int8(torch.linalg.lstsq(U, E).solution)
    return LowRank(u=u.T.to(torch.int8).contiguous(), v=v.to(torch.int8), scale=(su * sv).float())


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rank, n] and scale [rank]; a row of zeros gets the scale 1."""
    scale = rows.abs().amax(1) / TOP
    scale = torch.where(scale > 0, scale, 1.0)
    return (rows / scale[:, None]).round(), scale

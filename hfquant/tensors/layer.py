"""What the methods pass to each other: one linear layer on its way from W to what is stored of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .encoding import Activations, Encoding, Sparsity
from .grid import Grid

LEAST_ROWS, ELEMENTS = 512, 1 << 20  # of a piece of a layer


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A correction U diag(scale) V of rank r in 8 bit.  u int8 [out, r], v int8 [r, in], scale float32 [r]."""

    u: Tensor
    v: Tensor
    scale: Tensor

    @property
    def rank(self) -> int:
        return self.scale.shape[0]

    def dense(self) -> Tensor:
        """float32 [out, in]"""
        return (self.u.float() * self.scale.float()) @ self.v.float()


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """All that is stored of one weight.

    codes uint8 [out, in]; scale [out, groups]; zero_point uint8 [out, groups].  On a grid of 16 bits the codes are the
    values themselves, and the other two have no columns.

    mask bool [out, in], True where a weight is kept: the others decode to zero, whatever their codes are; `pattern`
    (n, m) if n of every m in a row are.  low_rank is added to the decoded weight.  input_scale float32 [in]: the layer
    reads x / input_scale.  activations: how that is rounded, if it is; activation_scale and activation_zero float32
    [1]: of static ones.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid
    mask: Tensor | None = None
    pattern: tuple[int, int] | None = None
    low_rank: LowRank | None = None
    input_scale: Tensor | None = None
    activations: Activations | None = None
    activation_scale: Tensor | None = None
    activation_zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def encoding(self) -> Encoding:
        """What the checkpoint's config says of it."""
        sparsity = None
        if self.mask is not None:
            sparsity = Sparsity(*self.pattern) if self.pattern else Sparsity(int(self.mask.sum()))
        return Encoding(
            grid=self.grid,
            sparsity=sparsity,
            rank=0 if self.low_rank is None else self.low_rank.rank,
            activations=self.activations,
            scaled_input=self.input_scale is not None,
        )

    def dequantize(self) -> Tensor:
        """The matrix that multiplies what the layer is given, float32 [out, in]: rounding of activations apart."""
        W = self.grid.decode(self.codes, self.scale, self.zero_point)
        if self.mask is not None:
            W = W * self.mask
        if self.low_rank is not None:
            W = W + self.low_rank.dense()
        return W if self.input_scale is None else W / self.input_scale

    @property
    def filled(self) -> "Quantized":
        """The same weights without a mask: those not kept get the code that decodes to zero."""
        if self.mask is None:
            return self
        nothing = (
            self.grid.expand(self.zero_point, self.shape[1]) if not self.grid.is_float else self.codes.new_zeros(())
        )
        return replace(self, codes=torch.where(self.mask, self.codes, nothing), mask=None, pattern=None)

    @property
    def base(self) -> "Quantized":
        """The weights alone: without low rank, input scale and activations."""
        return replace(
            self, low_rank=None, input_scale=None, activations=None, activation_scale=None, activation_zero=None
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[Quantized]") -> "Quantized":
        """The rows of all one after the other (experts, pieces of a table); they must have no low rank."""
        mask = None if parts[0].mask is None else torch.cat([Q.mask for Q in parts if Q.mask is not None])
        codes, scale, zero_point = (
            torch.cat([getattr(Q, name) for Q in parts]) for name in ("codes", "scale", "zero_point")
        )
        return replace(parts[0], codes=codes, scale=scale, zero_point=zero_point, mask=mask)

    def rows(self, rows: slice) -> "Quantized":
        """The part of it that makes these rows of the output."""
        low_rank = self.low_rank and replace(self.low_rank, u=self.low_rank.u[rows])
        mask = None if self.mask is None else self.mask[rows]
        codes, scale, zero_point = self.codes[rows], self.scale[rows], self.zero_point[rows]
        return replace(self, codes=codes, scale=scale, zero_point=zero_point, mask=mask, low_rank=low_rank)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix and what is known about it; a method is Layer -> Layer.

    name: module path in the model.  W float32 [out, in], as trained.  H float32 [in, in] = 2/n · XXᵀ over the
    calibration tokens (any positive factor gives the same result).  C float32 [in, in] = 2/n · X̃Xᵀ where X̃ is
    the input the layer had in the original model; None where only one stream was run.

    What steps have made of it: aim float32 [out, in], what they want it to become, where that is not W (see
    `methods._target`); V float32 [out, in], W as they changed it; mask bool [out, in], True where a weight is kept, and
    its pattern (n, m) if it has one; Q; low_rank; trail, (method, error after it) of every step.
    """

    name: str
    W: Tensor
    H: Tensor | None = None
    C: Tensor | None = None
    aim: Tensor | None = None
    V: Tensor | None = None
    mask: Tensor | None = None
    pattern: tuple[int, int] | None = None
    Q: Quantized | None = None
    low_rank: LowRank | None = None
    trail: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def current(self) -> Tensor:
        """W as the steps so far changed it, before any rounding, float32 [out, in]."""
        return self.W if self.V is None else self.V

    @property
    def effective(self) -> Tensor:
        """The weight that will run, float32 [out, in]."""
        W = self.current if self.Q is None else self.Q.dequantize()
        if self.mask is not None:
            W = W * self.mask
        return W if self.low_rank is None else W + self.low_rank.dense()

    @property
    def lost(self) -> Tensor:
        """What the weight that will run lacks, float32 [out, in]."""
        return (self.W if self.aim is None else self.aim) - self.effective

    def error(self) -> float:
        """‖(W − Ŵ)X‖ / ‖WX‖; without H, ‖W − Ŵ‖ / ‖W‖.  Of a layer with an `aim`, the distance from that."""
        lost = sum(float(_energy(part.lost, self.H)) for part in self.parts())
        return math.sqrt(max(0.0, lost) / max(self.energy, torch.finfo(torch.float32).tiny))

    @property
    def energy(self) -> float:
        """‖WX‖², by which the squared errors of parts add up to that of the whole; without H, ‖W‖²."""
        return sum(float(_energy(part.W, self.H)) for part in self.parts())

    def parts(self) -> "Iterator[Layer]":
        """Its rows in pieces, as equal as may be: what is made of a piece on the way to a result is several times as
        large as the piece.  How many there are follows from the shape alone."""
        out, n = self.W.shape
        pieces = -(-out // max(LEAST_ROWS, ELEMENTS // n))
        rows = -(-out // pieces)
        return (self.rows(slice(at, at + rows)) for at in range(0, out, rows))

    def rows(self, rows: slice) -> "Layer":
        """The part of it that makes these rows of the output."""
        aim, V, mask = (None if t is None else t[rows] for t in (self.aim, self.V, self.mask))
        low_rank = self.low_rank and replace(self.low_rank, u=self.low_rank.u[rows])
        Q = self.Q and self.Q.rows(rows)
        return replace(self, W=self.W[rows], aim=aim, V=V, mask=mask, Q=Q, low_rank=low_rank)

    def stored(self, dtype: torch.dtype) -> Quantized:
        """What is stored of it: Q, or the values in `dtype` where no step quantized; with mask and low rank."""
        Q = self.Q
        if Q is None:
            grid = Grid(16, -1)
            scale, zero_point = grid.fit(self.current, dtype=dtype)
            Q = Quantized(
                codes=grid.encode(self.current, scale, zero_point), scale=scale, zero_point=zero_point, grid=grid
            )
        return replace(Q, mask=self.mask, pattern=self.pattern, low_rank=self.low_rank)


def _energy(A: Tensor, H: Tensor | None) -> Tensor:
    """tr(A H Aᵀ)"""
    return A.square().sum() if H is None else ((A @ H) * A).sum()

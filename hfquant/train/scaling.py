"""Weights whose grid is learned with them: module-wise dynamic scaling (QuantGPT, section 3.2), and three rivals.

With n = 2ᵇ⁻¹ − 1 levels on each side of zero and the step s = α/n:

    ŵ = s · ⌊clip(w/s, −n, n)⌉

dynamic  α = γ · mean|w|, γ learned, one for a matrix or for each row (equations 6 and 7): the clipping follows the
         weights as they change, and one learning rate fits modules of any size.  With u = w/α,
         ∂ŵ/∂γ = mean|w| · (⌊nu⌉/n − u where |w| ≤ α, else sign w)
pact     α learned; ∂ŵ/∂α = sign w where |w| > α, else 0 (Choi et al., 2018; arXiv:1805.06085)
lsq      s learned; ∂ŵ/∂s = ⌊w/s⌉ − w/s where |w| ≤ α, else n·sign w, times 1/√(n·count) (Esser et al., 2020;
         arXiv:1902.08153)
laq      α is what minimizes Σ d (ŵ − w)², d from Adam's second moments (Hou & Kwok, 2018; arXiv:1802.08635)

All: ∂ŵ/∂w = 1 where |w| ≤ α, else 0; laq: 1.  mean|w| is a constant to the gradient.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..methods._learned import through
from ..tensors.grid import Grid, storable
from ..tensors.layer import Quantized

Kind = Literal["dynamic", "pact", "lsq", "laq"]
Start = Literal["search", "paper"]
LEAST = 1e-3  # of γ, and of α as a share of mean|w|: a clipping at zero would never open again
ROUNDS = 3  # of laq's codes for a scale and scale for the codes, after each step; it begins where the last one ended


class Stepped(torch.autograd.Function):
    """(w, s) -> s · ⌊clip(w/s, −n, n)⌉.  w [out, groups, columns]; s broadcasts against it.

    inner: whether weights that are not clipped have a part in ∂ŵ/∂s.  clipped: whether those that are have none in
    ∂ŵ/∂w.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, n: int, inner: bool, clipped: bool) -> Tensor:
        ctx.save_for_backward(w, s)
        ctx.n, ctx.inner, ctx.clipped = n, inner, clipped
        return steps(w, s, n) * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        w, s = ctx.saved_tensors
        ratio = w / s
        inside = ratio.abs() <= ctx.n
        dw = ds = None
        if ctx.needs_input_grad[0]:
            dw = grad * inside if ctx.clipped else grad
        if ctx.needs_input_grad[1]:
            within = ratio.round() - ratio if ctx.inner else torch.zeros_like(ratio)
            ds = (grad * torch.where(inside, within, ratio.sign() * ctx.n)).sum_to_size(s.shape)
        return dw, ds, None, None, None


def steps(w: Tensor, s: Tensor, n: int) -> Tensor:
    """⌊clip(w/s, −n, n)⌉: whole numbers, as floats."""
    return (w / s).clamp_(-n, n).round_()


class Scaling(nn.Module):
    """How one weight [out, in] is put on its grid; in training a function of the weight and of what is learned here.

    grid: symmetric.  whole: one scale for the matrix, where the grid would have one for each row or group.
    dtype: of the scales as they will be stored; they are rounded to it here already.
    """

    counts: Tensor
    alpha: Tensor

    def __init__(self, W: Tensor, grid: Grid, kind: Kind, start: Start, dtype: torch.dtype, *, whole: bool) -> None:
        super().__init__()
        self.grid, self.kind, self.dtype, self.whole = grid, kind, dtype, whole
        self.n, self.shape = 2 ** (grid.bits - 1) - 1, (W.shape[0], W.shape[1])
        self.columns = grid.columns(W.shape[1])
        counts = torch.full((grid.groups(W.shape[1]), 1), float(self.columns))
        counts[-1] -= -W.shape[1] % self.columns  # the last group of a row may be shorter
        self.register_buffer("counts", counts, persistent=False)
        w = self._grouped(W.detach().float())
        alpha = self._alpha(w, start)
        if kind == "laq":
            self.register_buffer("alpha", alpha)
        else:
            unit = self._size(w) if kind == "dynamic" else self.n if kind == "lsq" else 1
            self.gain = nn.Parameter(alpha / unit)

    def _grouped(self, W: Tensor) -> Tensor:
        return nn.functional.pad(W, (0, -W.shape[1] % self.columns)).unflatten(1, (-1, self.columns))

    def _mean(self, w: Tensor) -> Tensor:
        """Over the weights that share a scale.  w [out, groups, columns] -> [out, groups, 1], or [1, 1, 1]"""
        if self.whole:
            return w.sum((0, 1, 2), keepdim=True) / (self.shape[0] * self.shape[1])
        return w.sum(-1, keepdim=True) / self.counts

    def _size(self, w: Tensor) -> Tensor:
        """mean|w|, never zero."""
        return self._mean(w.abs()).clamp(min=1e-12)

    def _alpha(self, w: Tensor, start: Start) -> Tensor:
        """Where the clipping begins: as the papers have it, or with the least squared error."""
        size = self._size(w)
        largest = (w.abs().amax() if self.whole else w.abs().amax(-1, keepdim=True)).expand_as(size).clone()
        if start == "paper":
            return {"dynamic": size, "pact": largest, "lsq": 2 * size * math.sqrt(self.n), "laq": size}[self.kind]
        best, found = torch.full_like(size, torch.inf), size.clone()
        for share in torch.linspace(0.1, 1, 37).tolist():
            alpha = (share * largest).clamp(min=LEAST * size)
            s = alpha / self.n
            error = self._mean((steps(w, s, self.n) * s - w).square())
            found, best = torch.where(error < best, alpha, found), torch.minimum(error, best)
        return found

    def step(self, w: Tensor) -> Tensor:
        """s as it will be stored, with the gradients of its definition.  w [out, groups, columns]"""
        if self.kind == "laq":
            s = self.alpha / self.n
        elif self.kind == "lsq":
            share = 1 / math.sqrt(self.n * self.shape[0] * self.shape[1] / self.gain.numel())
            s = through(self.gain * share, self.gain.detach().clamp(min=LEAST * self._size(w.detach()) / self.n))
        else:
            size = self._size(w.detach())
            dynamic = self.kind == "dynamic"
            floor = torch.full_like(size, LEAST) if dynamic else LEAST * size
            s = through(self.gain, self.gain.detach().clamp(min=floor)) * (size if dynamic else 1) / self.n
        return through(s, storable(s.detach(), self.dtype))

    @torch.no_grad()
    def solve(self, W: Tensor, second: Tensor) -> None:
        """laq, after a step of the optimizer: α for these weights.  second [out, in]: the squared gradients' mean."""
        w, d, alpha = self._grouped(W.float()), self._grouped(second.float().sqrt() + 1e-8), self.alpha
        for _ in range(ROUNDS):
            codes = steps(w, alpha / self.n, self.n) / self.n
            new = self._mean(d * w * codes) / self._mean(d * codes.square()).clamp(min=1e-20)
            alpha = torch.where(new > 0, new, alpha)
        self.alpha.copy_(alpha)

    def forward(self, W: Tensor) -> Tensor:
        """W [out, in] on its grid, float32."""
        w = self._grouped(W.float())
        on_grid: Tensor = Stepped.apply(w, self.step(w), self.n, self.kind != "pact", self.kind != "laq")
        return on_grid.flatten(1)[:, : W.shape[1]]

    @torch.no_grad()
    def quantized(self, W: Tensor) -> Quantized:
        """What is stored of W: it decodes to `forward(W)`, bit for bit."""
        w = self._grouped(W.detach().float())
        s = self.step(w)
        codes = steps(w, s, self.n).add_(self.grid.middle).flatten(1)[:, : W.shape[1]]
        scale = s.expand(*w.shape[:2], 1)[..., 0].to(self.dtype).contiguous()
        zero = torch.full_like(scale, self.grid.middle, dtype=torch.uint8)
        return Quantized(codes=codes.to(torch.uint8).contiguous(), scale=scale, zero_point=zero, grid=self.grid)

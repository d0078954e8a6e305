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
MOMENTS = 0.999  # how slowly laq's second moments follow the gradients, as Adam's do


class Stepped(torch.autograd.Function):
    """(w, s) -> s · ⌊clip(w/s, −n, n)⌉.  w [out, groups, columns]; s broadcasts against it.

    inner: whether weights that are not clipped have a part in ∂ŵ/∂s; clipped: whether those that are have none in ∂ŵ/∂w.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, n: int, inner: bool, clipped: bool) -> Tensor:
        steps = (w / s).clamp_(-n, n).round_()
        ctx.save_for_backward(w, s, steps)
        ctx.n, ctx.inner, ctx.clipped = n, inner, clipped
        return steps * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        w, s, steps = ctx.saved_tensors
        ratio = w / s
        inside = ratio.abs() <= ctx.n
        dw = ds = None
        if ctx.needs_input_grad[0]:
            dw = grad * inside if ctx.clipped else grad
        if ctx.needs_input_grad[1]:
            within = steps - ratio if ctx.inner else torch.zeros_like(steps)
            ds = (grad * torch.where(inside, within, steps)).sum_to_size(s.shape)
        return dw, ds, None, None, None


class Scaling(nn.Module):
    """How one weight [out, in] is put on its grid; in training a function of the weight and of what is learned here.

    grid: symmetric.  whole: one scale for the matrix, where the grid would have one for each row.
    dtype: of the scales as they will be stored; they are rounded to it here already.
    """

    def __init__(self, W: Tensor, grid: Grid, kind: Kind, start: Start, dtype: torch.dtype, *, whole: bool) -> None:
        super().__init__()
        self.grid, self.kind, self.dtype, self.whole = grid, kind, dtype, whole
        self.n = 2 ** (grid.bits - 1) - 1
        self.columns = grid.columns(W.shape[1])
        alpha = self._alpha(self._grouped(W.detach().float()), start)
        if kind == "laq":
            self.register_buffer("alpha", alpha)
            self.register_buffer("second", torch.zeros_like(W, dtype=torch.float32))
            self.register_buffer("seen", torch.zeros(()))
        elif kind == "lsq":
            self.gain = nn.Parameter(alpha / self.n)
        else:
            size = self._size(self._grouped(W.detach().float())) if kind == "dynamic" else 1.0
            self.gain = nn.Parameter(alpha / size)

    def _grouped(self, W: Tensor) -> Tensor:
        return nn.functional.pad(W, (0, -W.shape[1] % self.columns)).unflatten(1, (-1, self.columns))

    def _mean(self, w: Tensor) -> Tensor:
        """Over the weights that share a scale.  w [out, groups, columns] -> [out, groups, 1], or [1, 1, 1]"""
        return w.mean((0, 1, 2), keepdim=True) if self.whole else w.mean(-1, keepdim=True)

    def _size(self, w: Tensor) -> Tensor:
        """mean|w|, never zero."""
        return self._mean(w.abs()).clamp(min=1e-12)

    def _alpha(self, w: Tensor, start: Start) -> Tensor:
        """Where the clipping begins: as the papers have it, or with the least squared error."""
        size = self._size(w)
        if start == "paper":
            if self.kind == "lsq":
                return 2 * size * math.sqrt(self.n)
            largest = w.abs().amax() if self.whole else w.abs().amax(-1, keepdim=True)
            return largest.expand_as(size).clone() if self.kind == "pact" else size
        best, found = torch.full_like(size, torch.inf), size.clone()
        largest = (w.abs().amax() if self.whole else w.abs().amax(-1, keepdim=True)).expand_as(size)
        for share in torch.linspace(0.1, 1, 37).tolist():
            alpha = (share * largest).clamp(min=LEAST * size)
            error = self._mean((Stepped.apply(w, alpha / self.n, self.n, True, True) - w).square())
            found, best = torch.where(error < best, alpha, found), torch.minimum(error, best)
        return found

    def watch(self, parameter: nn.Parameter, transposed: bool) -> None:
        """laq: follow the gradients of the weight."""

        def note(grad: Tensor) -> None:
            g = grad.detach().float()
            self.second.lerp_((g.T if transposed else g).square(), 1 - MOMENTS)
            self.seen.add_(1)

        if self.kind == "laq":
            parameter.register_hook(note)

    def step(self, w: Tensor) -> Tensor:
        """s as it will be stored, with the gradients of its definition.  w [out, groups, columns]"""
        if self.kind == "laq":
            s = self._solved(w.detach()) / self.n
        elif self.kind == "lsq":
            share = 1 / math.sqrt(self.n * w.numel() / self.gain.numel())
            s = through(self.gain * share, self.gain.detach())
            s = through(s, s.detach().clamp(min=LEAST * float(self._size(w.detach()).mean()) / self.n))
        else:
            size = self._size(w.detach())
            floor = LEAST if self.kind == "dynamic" else LEAST * size
            gain = through(self.gain, self.gain.detach().clamp(min=floor))
            s = gain * (size if self.kind == "dynamic" else 1) / self.n
        return through(s, storable(s.detach(), self.dtype))

    def _solved(self, w: Tensor) -> Tensor:
        """laq's α: in turn the codes for a scale and the scale for the codes, from where it was."""
        alpha: Tensor = self.alpha
        seen = float(self.seen)
        d = (self.second / (1 - MOMENTS**seen)).sqrt() + 1e-8 if seen else torch.ones_like(self.second)
        d = self._grouped(d)
        for _ in range(3):
            codes = (w * self.n / alpha).clamp_(-self.n, self.n).round_() / self.n
            new = self._mean(d * w * codes) / self._mean(d * codes.square()).clamp(min=1e-20)
            alpha = torch.where(new > 0, new, alpha)
        if self.training:
            self.alpha.copy_(alpha)
        return alpha

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
        codes = (w / s).clamp_(-self.n, self.n).round_().add_(self.grid.middle)
        scale = s.expand(*w.shape[:2], 1)[..., 0].to(self.dtype).contiguous()
        zero = torch.full_like(scale, self.grid.middle, dtype=torch.uint8)
        codes = codes.flatten(1)[:, : W.shape[1]].to(torch.uint8).contiguous()
        return Quantized(codes=codes, scale=scale, zero_point=zero, grid=self.grid)

"""A compressed weight as a function of what can be learned of it, with the gradients of its definition.

On a grid of whole numbers, with u the codes before rounding, s the groups' scales and z their zero points, which stay:

    Ŵ = s · (clip(⌊u⌉, 0, 2ᵇ − 1) − z)

⌊·⌉ is passed through by gradients where u is inside the range, and by none outside (straight-through; Bengio et al.,
2013, arXiv:1308.3432).  Weights that are pruned only are learned as they are.  What is stored comes from the same
expressions: nothing is rounded again.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..llvm import refused
from ..tensors.grid import storable
from ..tensors.layer import Quantized

SLACK = 0.45  # how far from its code a weight may begin; at 0.5 the first step would move it, however small


class Learned(Protocol):
    """latent: what becomes the codes, in steps of the grid.  scale: what the scales are multiplied by, 1 at first."""

    latent: Tensor
    scale: Tensor

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that will run, [out, in], a function of `latent` and `scale`.

        dtype: what it will be rounded to anyway; where that saves something, it is here, else it is float32.
        """
        ...

    def quantized(self) -> Quantized:
        """What is stored: it decodes to `weight()`, bit for bit."""
        ...


def learned(Q: Quantized, W: Tensor) -> Learned:
    """Q as a function of what can be learned of it; it begins as it is.  W float32 [out, in]: what Q was made of."""
    return Values(Q) if Q.grid.is_float else Codes(Q, W)


class OnGrid(torch.autograd.Function):
    """(u, s, z) -> s · (clip(⌊u⌉, 0, top) − z), of a type.  u [out, groups, columns]; s, z [out, groups, 1]

    ∂Ŵ/∂u = s inside the range, 0 outside; ∂Ŵ/∂s = code − z.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, s: Tensor, z: Tensor, top: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(u, s, z)
        ctx.top = top
        W = None
        if _for_generated(u, s, dtype):
            from . import _on_grid

            W = _on_grid.forward(u, s, z, top, dtype)
        return (_steps(u, z, top) * s).to(dtype) if W is None else W

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        u, s, z = ctx.saved_tensors
        found = None
        if _for_generated(u, s, grad.dtype):
            from . import _on_grid

            found = _on_grid.backward(u, s, z, ctx.top, grad)
        if found is None:
            grad, inside = grad.to(u.dtype), (u > -0.5) & (u < ctx.top + 0.5)
            found = (grad * s).mul_(inside), (grad * _steps(u, z, ctx.top)).sum(-1, keepdim=True)
        du, ds = (t if needed else None for t, needed in zip(found, ctx.needs_input_grad, strict=False))
        return du, ds, None, None, None


def _for_generated(u: Tensor, s: Tensor, dtype: torch.dtype) -> bool:
    """Groups that fill vectors of 16, weights of a type that is stored."""
    fits = u.dtype == s.dtype == torch.float32 and u.is_contiguous() and u.shape[-1] % 16 == 0
    return fits and dtype in (torch.float32, torch.bfloat16, torch.float16) and refused(u, s) is None


def _steps(u: Tensor, z: Tensor, top: int) -> Tensor:
    return u.round().clamp_(0, top).sub_(z)


class Codes:
    """A weight on a grid.  latent: u, [out, groups, columns]; scale [out, groups, 1]"""

    def __init__(self, Q: Quantized, W: Tensor) -> None:
        self.Q, n = Q, Q.shape[1]
        self._pad = Q.grid.groups(n) * Q.grid.columns(n) - n
        s, z = (Q.grid.expand(t.float(), n) for t in (Q.scale, Q.zero_point))
        codes = Q.codes.float()
        if Q.input_scale is not None:
            W = W * Q.input_scale
        if Q.low_rank is not None:
            W = W - Q.low_rank.dense()
        near = (W / s + z - codes).clamp_(-SLACK, SLACK).add_(codes)
        self.latent = torch.nn.functional.pad(near, (0, self._pad)).unflatten(1, (-1, Q.grid.columns(n)))
        self.scale = torch.ones(*Q.scale.shape, 1)

    def _scales(self) -> Tensor:
        """As they will be stored, in float32; gradients pass the rounding to that type."""
        s = self.Q.scale.float()[..., None] * self.scale
        return through(s, storable(s.detach(), self.Q.scale.dtype))

    def _flat(self, grouped: Tensor) -> Tensor:
        return grouped.flatten(1)[:, : self.Q.shape[1]]

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        zero = self.Q.zero_point.float()[..., None]
        alone = self.Q.mask is None and self.Q.low_rank is None and self.Q.input_scale is None
        kind = dtype if alone else torch.float32
        W: Tensor = OnGrid.apply(self.latent, self._scales(), zero, self.Q.grid.top, kind)
        return beside(self._flat(W), self.Q)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        codes = self._flat(self.latent.round().clamp_(0, self.Q.grid.top)).to(torch.uint8)
        return replace(self.Q, codes=codes.contiguous(), scale=self._scales()[..., 0].to(self.Q.scale.dtype))


class Values:
    """A weight that is pruned and not rounded.  latent [out, in]: steps of one 256th of the largest in its row."""

    def __init__(self, Q: Quantized) -> None:
        self.Q = Q
        self._start = Q.codes.float()
        self._step = self._start.abs().amax(1, keepdim=True) / 256
        self.latent, self.scale = torch.zeros_like(self._start), torch.ones(Q.shape[0], 1)

    def _values(self) -> Tensor:
        W = (self._start + self._step * self.latent) * self.scale
        return through(W, W.detach().to(self.Q.codes.dtype).float())

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return beside(self._values(), self.Q)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        return replace(self.Q, codes=self._values().to(self.Q.codes.dtype))


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of x."""
    return rounded + (x - x.detach())


def beside(W: Tensor, Q: Quantized) -> Tensor:
    """W [out, in] with all else that Q holds, in the order in which `Quantized.dequantize` applies it."""
    if Q.mask is not None:
        W = W * Q.mask
    if Q.low_rank is not None:
        W = W + Q.low_rank.dense()
    return W if Q.input_scale is None else W / Q.input_scale

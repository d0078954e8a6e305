"""A compressed weight as a function of what can be learned of it, with the gradients of its definition.

    Ŵ = s · (clip(⌊u⌉, 0, 2ᵇ − 1) − z)

u are the codes before rounding, s the groups' scales, relative to where they began; z stays.  ⌊·⌉ is passed through by
gradients inside the range and by none outside of it (straight-through; Bengio et al., 2013, arXiv:1308.3432).  What is
stored is computed by the same expressions: nothing is rounded again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..tensors.grid import storable
from ..tensors.layer import Quantized

SLACK = 0.45  # how far from its code a weight may begin: at 0.5 the first step of any size would move it


class OnGrid(torch.autograd.Function):
    """(u, s, z) -> s · (clip(⌊u⌉) − z).  u [out, groups, columns], s and z [out, groups, 1]

    ∂Ŵ/∂u = s inside the range, ∂Ŵ/∂s = code − z.
    """

    @staticmethod
    def forward(ctx, u: Tensor, s: Tensor, z: Tensor, top: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        steps = u.round().clamp_(0, top).sub_(z)
        ctx.save_for_backward(u, s, steps)
        ctx.top = top
        return steps * s

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        u, s, steps = ctx.saved_tensors
        inside = (u > -0.5) & (u < ctx.top + 0.5)
        du = (grad * s).mul_(inside) if ctx.needs_input_grad[0] else None
        ds = (grad * steps).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return du, ds, None, None


class Learned:
    """One weight of a finished block.

    latent float32 [out, groups, columns]: u.  scale float32 [out, groups, 1]: what s is multiplied with, 1 at first.
    """

    def __init__(self, Q: Quantized, W: Tensor) -> None:
        """W float32 [out, in]: what Q was made of, divided as Q is where its input is divided."""
        self.Q, self.grid = Q, Q.grid
        n = Q.shape[1]
        self.pad = self.grid.groups(n) * self.grid.columns(n) - n
        s, z = (self.grid.expand(t.float(), n) for t in (Q.scale, Q.zero_point))
        codes = Q.codes.float()
        ideal = (W / s + z - codes).clamp_(-SLACK, SLACK).add_(codes)
        self.latent = self._grouped(ideal)
        self.scale = torch.ones_like(Q.scale, dtype=torch.float32)[..., None]

    def _grouped(self, t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, self.pad)).unflatten(1, (-1, self.grid.columns(self.Q.shape[1])))

    def _scales(self) -> Tensor:
        """As they will be stored, in float32; gradients pass the rounding to that type."""
        s = self.Q.scale.float()[..., None] * self.scale
        stored = storable(s.detach(), self.Q.scale.dtype).to(self.Q.scale.dtype).float()
        return s + (stored - s.detach())

    def weight(self) -> Tensor:
        """The weight that will run, float32 [out, in], a function of `latent` and `scale`."""
        zero = self.Q.zero_point.float()[..., None]
        W = OnGrid.apply(self.latent, self._scales(), zero, self.grid.top).flatten(1)[:, : self.Q.shape[1]]
        if self.Q.mask is not None:
            W = W * self.Q.mask
        if self.Q.low_rank is not None:
            W = W + self.Q.low_rank.dense()
        return W if self.Q.input_scale is None else W / self.Q.input_scale

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """What is stored: it decodes to `weight()`, bit for bit."""
        codes = self.latent.round().clamp_(0, self.grid.top).flatten(1)[:, : self.Q.shape[1]]
        scale = self._scales()[..., 0].to(self.Q.scale.dtype)
        return replace(self.Q, codes=codes.to(torch.uint8).contiguous(), scale=scale)

"""Rounding what a layer reads: x ≈ scale · (code − zero), with signed codes.

This is the definition.  Calibration uses it to see what will run, the operators compute the same in integers.

Symmetric: scale = max|x| / (2ᵇ⁻¹ − 1), zero = 0 (SmoothQuant, arXiv:2211.10438, equation 1).  Asymmetric: the range
[min(x, 0), max(x, 0)] is spread over all 2ᵇ codes, so that 0 stays exact.
"""

from typing import Any

import torch
from torch import Tensor

from .encoding import Activations

LEAST = 1e-9  # the smallest scale: an input that is all zeros has no range


def bounds(activations: Activations) -> tuple[int, int]:
    """The smallest and the largest code."""
    top = 2 ** (activations.bits - 1) - 1
    return (-top, top) if activations.symmetric else (-top - 1, top)


def scale_of(low: Tensor, high: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """Scale and zero point of inputs that lie in [low, high], float32 of the same shape; the zero point is integral."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    bottom, top = bounds(activations)
    if activations.symmetric:
        scale = torch.maximum(-low, high).div(top).clamp(min=LEAST)
        return scale, torch.zeros_like(scale)
    scale = (high - low).div(top - bottom).clamp(min=LEAST)
    return scale, (bottom - (low / scale).round()).clamp(bottom, top)


def dynamic_scale(x: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an input at hand.

    x [..., in] -> float32 [..., 1] per token, [..., groups] per group (the last of which may be shorter), [1] per
    tensor.
    """
    if activations.per == "group":
        x = _grouped(x, activations)
    if activations.per in ("token", "group"):
        low, high = x.amin(-1), x.amax(-1)
        low, high = (low[..., None], high[..., None]) if activations.per == "token" else (low, high)
    else:
        low, high = x.amin()[None], x.amax()[None]
    return scale_of(low, high, activations)


def quantize(x: Tensor, activations: Activations, scale: Tensor, zero: Tensor) -> Tensor:
    """x [..., in] -> codes int8 [..., in]; rounds half to even.  scale, zero: from `dynamic_scale`, or stored [1]"""
    bottom, top = bounds(activations)
    s, z = (_spread(t, x.shape[-1], activations) for t in (scale, zero))
    return (x.float() / s).round_().add_(z).clamp_(bottom, top).to(torch.int8)


def fake_quantize(
    x: Tensor, activations: Activations, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x [..., in] as the layer will read it, in the type of x.  scale, zero [1]: of static activations, else None.

    Gradients pass it as they come where x is inside the range, and not at all outside (straight-through).
    """
    values = x.detach()
    if activations.per != "static":
        scale, zero = dynamic_scale(values, activations)
    assert scale is not None, "static activations have a stored scale"
    zero = torch.zeros_like(scale) if zero is None else zero
    scale, zero = scale.to(x.device), zero.to(x.device)
    codes = quantize(values, activations, scale, zero)
    s, z = (_spread(t, x.shape[-1], activations) for t in (scale, zero))
    read = codes.float().sub_(z).mul_(s).to(x.dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return read
    inside = (values.float() - read.float()).abs() <= 0.5001 * s if activations.per == "static" else None
    passed: Tensor = _Through.apply(x, read, inside)
    return passed


class _Through(torch.autograd.Function):
    """(x, y, inside) -> y, with the gradient of x where `inside`, everywhere if that is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, inside: Tensor | None) -> Tensor:
        ctx.inside = inside
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.inside is None else grad * ctx.inside, None, None


def _grouped(x: Tensor, activations: Activations) -> Tensor:
    """[..., in] -> [..., groups, group_size]; zeros, which change no range, fill the last one up."""
    size = min(activations.group_size, x.shape[-1])
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size))


def _spread(per_group: Tensor, in_features: int, activations: Activations) -> Tensor:
    """A scale or zero point in a shape that broadcasts against [..., in]."""
    if activations.per != "group":
        return per_group
    return per_group.repeat_interleave(min(activations.group_size, in_features), -1)[..., :in_features]

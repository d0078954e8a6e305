"""What a layer does around its weights:   y = x̂ Ŵᵀ + ((x̂ Vᵀ) · s) Uᵀ + bias.

x̂ is x over its stored scale, rounded if the encoding says so; Ŵ the weights, U, V and s the low-rank correction.
Kernels that only multiply by Ŵ call these before and after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors.activations import dynamic_scale
from ..tensors.formats import Extras
from ..tensors.layer import LowRank
from .reference import Matrix


def before(x: Tensor, matrix: Matrix) -> Tensor:
    """x over its stored scale, in x's dtype.  x [..., in]"""
    if not matrix.encoding.scaled_input:
        return x
    scale = matrix.extras.input_scale
    assert scale is not None
    return (x.float() / scale).to(x.dtype)


def after(y: Tensor, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """y = x Ŵᵀ with the correction and the bias; x is what `before` returned.  y [..., out]"""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if matrix.encoding.rank:
        low_rank = matrix.extras.low_rank
        assert low_rank is not None
        y = y + correction(x, low_rank)
    return y


def correction(x: Tensor, low_rank: LowRank) -> Tensor:
    """((x Vᵀ) · s) Uᵀ.  x [..., in] -> [..., out] in x's dtype"""
    inner = F.linear(x, low_rank.v.to(x.dtype)) * low_rank.scale.to(x.dtype)
    return F.linear(inner, low_rank.u.to(x.dtype))


def rounding(x: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
    """Scale and zero point of what a layer reads, stored or of the input at hand: see `tensors.activations`."""
    assert extras.activations is not None
    scale, zero = extras.activation_scale, extras.activation_zero
    if scale is None:
        scale, zero = dynamic_scale(x, extras.activations)
    return scale, torch.zeros_like(scale) if zero is None else zero

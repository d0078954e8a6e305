"""What a layer computes, whatever its encoding:   y = x̂ Ŵᵀ + ((x̂ Vᵀ) · s) Uᵀ + bias.

x̂ is x over its stored scale, rounded if the encoding says so; Ŵ the weights, U, V and s the low-rank correction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors.activations import dynamic_scale, fake_quantize, quantize
from ..tensors.layer import LowRank
from . import integers
from .kernels import cpu
from .reference import Matrix, dense


def linear(x: Tensor, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype."""
    encoding = matrix.encoding
    if encoding.activations is not None:
        return _rounded(x, bias, matrix)
    bias, low_rank = None if bias is None else bias.to(x.dtype), None
    if encoding.rank or encoding.scaled_input:
        extras = matrix.extras
        low_rank = extras.low_rank
        if extras.input_scale is not None:
            x = (x.float() / extras.input_scale).to(x.dtype)
    y = cpu.linear(x, matrix)
    if y is None:
        y = F.linear(x, _weights(matrix, x.dtype), bias)
    elif bias is not None:
        y = y + bias
    return y if low_rank is None else y + correction(x, low_rank)


def _weights(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Ŵ [out, in]; where it is not quantized it needs no decoding."""
    base = matrix.base()
    return base.codes.to(dtype) if base.grid.is_float else dense(base, dtype)


def correction(x: Tensor, low_rank: LowRank) -> Tensor:
    """((x Vᵀ) · s) Uᵀ.  x [..., in] -> [..., out] in x's dtype"""
    inner = F.linear(x, low_rank.v.to(x.dtype)) * low_rank.scale.to(x.dtype)
    return F.linear(inner, low_rank.u.to(x.dtype))


def _rounded(x: Tensor, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """The same where x is rounded; all in float32 but for the integers."""
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], matrix.shape[0])
    extras, activations = matrix.extras, matrix.encoding.activations
    assert activations is not None
    rows = x.reshape(-1, matrix.shape[1]).float()
    if extras.input_scale is not None:
        rows = rows / extras.input_scale
    scale, zero = extras.activation_scale, extras.activation_zero
    if scale is None:
        scale, zero = dynamic_scale(rows, activations)
    zero = torch.zeros_like(scale) if zero is None else zero
    if matrix.encoding.grid.is_float:
        cpu.explain(matrix, x, "the reference (weights are not quantized)")
        seen = fake_quantize(rows, activations, scale, zero)
        y = F.linear(seen, _weights(matrix, torch.float32))
    else:
        cpu.explain(matrix, x, "integers")
        y = integers.linear(quantize(rows, activations, scale, zero), scale, zero, matrix)
        seen = rows if extras.low_rank is None else fake_quantize(rows, activations, scale, zero)
    if extras.low_rank is not None:
        y += correction(seen, extras.low_rank)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], matrix.shape[0])

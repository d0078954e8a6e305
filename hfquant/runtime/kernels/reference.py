"""The definition: decode the weight, multiply.  Takes everything, on every device."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tensors.activations import fake_quantize, quantize
from .. import integers
from ..extras import after, before, correction, rounding
from ..reference import Matrix, dense

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


class Reference:
    name = "reference"
    rank = 100
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        return None

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        if matrix.encoding.activations is not None:
            return rounded(x, matrix, bias, partial(integers.linear, matrix=matrix, product=integers.exact))
        x = before(x, matrix)
        bias = None if bias is None else bias.to(x.dtype)
        return after(F.linear(x, weights(matrix, x.dtype), bias), x, matrix, None)


def weights(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Ŵ [out, in]; where it is not quantized it needs no decoding."""
    base = matrix.base()
    return base.codes.to(dtype) if base.grid.is_float else dense(base, dtype)


def rounded(x: Tensor, matrix: Matrix, bias: Tensor | None, multiply: Multiply) -> Tensor:
    """A layer whose input is rounded; all in float32 but for the integers.  x [rows, in] -> [rows, out]

    multiply(codes of x, scale, zero) -> float32 [rows, out]: the weights' part; not called where they are not
    quantized.
    """
    extras, activations = matrix.extras, matrix.encoding.activations
    assert activations is not None
    rows = x.float()
    if extras.input_scale is not None:
        rows = rows / extras.input_scale
    scale, zero = rounding(rows, extras)
    if matrix.encoding.grid.is_float:
        seen = fake_quantize(rows, activations, scale, zero)
        y = F.linear(seen, weights(matrix, torch.float32))
    else:
        y = multiply(quantize(rows, activations, scale, zero), scale, zero)
        seen = rows if extras.low_rank is None else fake_quantize(rows, activations, scale, zero)
    if extras.low_rank is not None:
        y += correction(seen, extras.low_rank)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


KERNEL = Reference()

"""Layers whose input is rounded, on NVIDIA GPUs: integer products of tensor cores, in Triton.

The integers are the reference's, and so is the order of the few floating-point operations on them.
"""

import torch
from torch import Tensor

from ...tensors.activations import dynamic_scale
from ..extras import correction
from ..reference import Matrix
from . import triton
from .triton.signed import LEAST, Integers, prepare, spans


class GpuRounded:
    name = "gpu_rounded"
    rank = 10
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        encoding = matrix.encoding
        if reason := triton.refuses_device(x.device.type, x.device.index):
            return reason
        if encoding.activations is None:
            return "inputs are not rounded"
        if encoding.grid.is_float:
            return "weights are not quantized"
        if x.dtype == torch.float64:
            return "inputs of 64 bits would be rounded twice"
        if matrix.device != x.device:
            return f"weights on {matrix.device}, inputs on {x.device}"
        if not matrix.trackable:
            return "weights made under torch.inference_mode: a change of them could not be noticed"
        least = spans(matrix.shape[1], encoding.grid, encoding.activations)[2]
        if least < LEAST:
            return f"{least} columns share their scales: not a multiple of {LEAST}"
        return None

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        with triton.launching(x.device):
            from .triton.rounded import rounded
            from .triton.tokens import tokens

            activations, extras = matrix.encoding.activations, matrix.extras
            assert activations is not None
            W: Integers = matrix.derive("gpu integers", lambda: prepare(matrix.quantized().base.filled, activations))
            rows = x if extras.input_scale is None else x.float() / extras.input_scale
            seen = tokens(rows, activations, W.columns, _given(rows, matrix))
            if extras.low_rank is None:
                return rounded(seen, W, x.dtype, bias)
            y = rounded(seen, W, torch.float32)
            y += correction(seen.values(rows.shape[1]), extras.low_rank)
            return (y if bias is None else y + bias.float()).to(x.dtype)


def _given(rows: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor | None] | None:
    """The scale and zero point that all rows share; None if each has its own."""
    activations, extras = matrix.encoding.activations, matrix.extras
    assert activations is not None
    if activations.per not in ("tensor", "static"):
        return None
    scale, zero = extras.activation_scale, extras.activation_zero
    if activations.per == "tensor":
        scale, zero = dynamic_scale(rows, activations)
    assert scale is not None, "static activations have a stored scale"
    return scale, None if activations.symmetric else zero


KERNEL = GpuRounded()

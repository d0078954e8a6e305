"""Weights of 1 to 8 bits on NVIDIA GPUs, x and all products as they are: Triton, with tensor cores.

Few rows are multiplied with the packed weights (`triton.planes`).  For many rows, where reading the weights is no
longer what takes the time, they are made dense for the moment (`triton.dense`) and multiplied by cuBLAS.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import after, before
from ..reference import Matrix
from . import triton
from .triton.configs import gpu, most_rows
from .triton.layout import LEAST, Weights, unit, weights


class GpuExact:
    name = "gpu_exact"
    rank = 10
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        grid = matrix.encoding.grid
        if reason := triton.refuses_device(x.device.type, x.device.index):
            return reason
        if matrix.encoding.activations is not None:
            return "inputs are rounded to integers"
        if grid.is_float:
            return "weights are not quantized"
        if x.dtype not in (torch.bfloat16, torch.float16):
            return f"inputs are {str(x.dtype).removeprefix('torch.')}: tensor cores multiply 16 bits"
        if matrix.device != x.device:
            return f"weights on {matrix.device}, inputs on {x.device}"
        if unit(grid, matrix.shape[1]) is None:
            return f"groups of {grid.columns(matrix.shape[1])} columns: not a multiple of {LEAST}"
        if not matrix.trackable:
            return "weights made under torch.inference_mode: a change of them could not be noticed"
        return None

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        with triton.launching(x.device):
            from .triton import dense, linear

            W: Weights = matrix.derive("gpu planes", lambda: weights(matrix.quantized().base.filled))
            x = before(x, matrix)
            if x.shape[0] > most_rows(gpu(x.device)):
                bias = None if bias is None else bias.to(x.dtype)
                return after(F.linear(x, dense.dense(W, x.dtype), bias), x, matrix, None)
            factors = matrix.extras.low_rank
            if factors is None or factors.rank > linear.RANKS[-1]:
                return after(linear.linear(x, W, bias), x, matrix, None)
            low_rank = matrix.derive(("gpu rank", x.dtype), lambda: linear.low_rank(factors, W, x.dtype))
            return linear.linear(x, W, bias, low_rank)


KERNEL = GpuExact()

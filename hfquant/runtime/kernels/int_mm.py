"""Rounded inputs by torch's own int8 products, bit for bit the reference."""

from functools import partial

from torch import Tensor

from .. import integers
from ..reference import Matrix
from .reference import rounded


class IntMM:
    name = "int_mm"
    rank = 90
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is None:
            return "inputs are not rounded"
        if matrix.encoding.grid.is_float:
            return "weights are not quantized"
        return None

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        return rounded(x, matrix, bias, partial(integers.linear, matrix=matrix, product=integers.fast))


KERNEL = IntMM()

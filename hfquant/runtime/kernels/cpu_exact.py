"""Generated code for few rows, with x as it is: codes become float32 in registers, and nothing is rounded but sums."""

from torch import Tensor

from ..reference import Matrix
from . import Bound, _tiles

MOST = 16  # rows; beyond, decoding the weight once is faster


class CpuExact:
    name = "cpu_exact"
    rank = 30
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is not None:
            return "inputs are rounded to integers"
        if x.shape[0] > MOST:
            return f"{x.shape[0]} rows: decoding the weight once is faster"
        return _tiles.refuses(x, matrix, None, real=True)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        return _tiles.linear(x, matrix, bias, None, real=True)

    def bind(self, x: Tensor, matrix: Matrix) -> Bound | None:
        return _tiles.bind(x, matrix, None, real=True)


KERNEL = CpuExact()

"""Generated code for layers whose input is rounded: the same integers as the reference."""

from torch import Tensor

from ..reference import Matrix
from . import Bound, _tiles


class CpuRounded:
    name = "cpu_rounded"
    rank = 10
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is None:
            return "inputs are not rounded"
        return _tiles.refuses(x, matrix, matrix.encoding.activations, real=False)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        return _tiles.linear(x, matrix, bias, matrix.encoding.activations, real=False)

    def bind(self, x: Tensor, matrix: Matrix) -> Bound | None:
        return _tiles.bind(x, matrix, matrix.encoding.activations, real=False)


KERNEL = CpuRounded()

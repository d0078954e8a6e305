"""Generated code, with x rounded to 8 bit: the fastest there is on a CPU, for any number of rows.

x is rounded as if the layer said `a8g64`: symmetric int8 with one scale for each row and group of 64 columns, or a
part of the weight's own group near it.  That costs a relative error of about 5.5e-3 in y, which does not depend on
the width of the weights; everything after it is exact in integers, and in float32 between groups.
"""

from torch import Tensor

from ..reference import Matrix
from . import Bound, _tiles


class CpuInt8:
    name = "cpu_int8"
    rank = 20
    exact = False

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is not None:
            return "the layer says itself how its input is rounded"
        return _tiles.refuses(x, matrix, None, real=False)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        return _tiles.linear(x, matrix, bias, None, real=False)

    def bind(self, x: Tensor, matrix: Matrix) -> Bound | None:
        return _tiles.bind(x, matrix, None, real=False)


KERNEL = CpuInt8()

"""Generated code with x as it is: codes become float32 in registers, and nothing is rounded but sums.

Few rows are fastest so.  Many rows of float32 are better multiplied by a weight that was decoded once; many rows of
16 bits too, but only on a processor that multiplies those itself: elsewhere torch takes several times as long as
this.
"""

import torch
from torch import Tensor

from ...machine import multiplies_bfloat16
from ..reference import Matrix
from . import Bound, _tiles

MOST = 64  # rows that are always faster so


class CpuExact:
    name = "cpu_exact"
    rank = 30
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is not None:
            return "inputs are rounded to integers"
        if x.shape[0] > MOST and (x.dtype == torch.float32 or multiplies_bfloat16()):
            return f"more than {MOST} rows: decoding the weight once is faster"
        return _tiles.refuses(x, matrix, None, real=True)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        return _tiles.linear(x, matrix, bias, None, real=True)

    def bind(self, x: Tensor, matrix: Matrix) -> Bound | None:
        return _tiles.bind(x, matrix, None, real=True)


KERNEL = CpuExact()

"""Generated code that decodes the weight, then torch's own product: for many rows that must be exact.

The decoded weight is bit for bit the reference's, and so is y.
"""

import torch.nn.functional as F
from torch import Tensor

from ..extras import after, before
from ..reference import Matrix
from . import Unavailable, _tiles


class CpuDense:
    name = "cpu_dense"
    rank = 40
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        if matrix.encoding.activations is not None:
            return "inputs are rounded to integers"
        return _tiles.unfit(x, matrix)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        from ..llvm import fast

        x, bias = before(x, matrix), None if bias is None else bias.to(x.dtype)
        try:
            W = fast.dense(_tiles.prepared(), matrix.base(), x.dtype)
        except (RuntimeError, OSError) as error:
            raise Unavailable(f"its code could not be made: {str(error).splitlines()[0]}") from error
        return after(F.linear(x, W, bias), x, matrix, None)


KERNEL = CpuDense()

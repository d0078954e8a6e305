"""oneDNN's int8 product, through torch: W8A8 with one scale for each row of the weight, packed once.

It is fast for unsigned inputs only, so q + 128 is given to it, with a zero point of 128, and scales of 1: what comes
back are the integers, as float32.  The layer's scales follow as in the reference, whose numbers these are bit for
bit. Without VNNI oneDNN's sums of 16 bits may overflow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...tensors.layer import Quantized
from ..reference import Matrix
from .reference import rounded

MIDDLE = 128


@dataclass(frozen=True)
class Packed:
    weight: Tensor  # in oneDNN's layout
    ones: Tensor  # float32 [out]
    zeros: Tensor  # int64 [out]
    scale: Tensor  # float32 [out]
    nbytes: int

    @classmethod
    def of(cls, Q: Quantized) -> "Packed":
        """Q symmetric, with one scale for each row."""
        signed = (Q.codes.to(torch.int16) - Q.grid.middle).to(torch.int8)
        out = Q.shape[0]
        return cls(
            torch.ops.onednn.qlinear_prepack(signed, None),
            torch.ones(out),
            torch.zeros(out, dtype=torch.int64),
            Q.scale.float().view(out),
            signed.nbytes + 16 * out,
        )

    def __call__(self, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """q int8 [rows, in] -> float32 [rows, out]"""
        shifted = (q.to(torch.int16) + MIDDLE).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, MIDDLE, self.weight, self.ones, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(self.scale).mul_(scale)


class OneDNN:
    name = "onednn"
    rank = 50
    exact = True

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        encoding, activations = matrix.encoding, matrix.encoding.activations
        if activations is None:
            return "inputs are not rounded"
        if x.device.type != "cpu" or matrix.device.type != "cpu":
            return f"for CPUs, not {x.device.type}"
        if encoding.grid.is_float or not encoding.grid.symmetric or not activations.symmetric:
            return "for symmetric integers"
        if encoding.grid.groups(matrix.shape[1]) > 1 or activations.per == "group":
            return "for one scale in each row and token"
        if not torch.cpu._is_vnni_supported():
            return "this processor has no VNNI"
        return None

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        packed: Packed = matrix.derive("onednn", lambda: Packed.of(matrix.quantized().base.filled))
        return rounded(x, matrix, bias, packed)


KERNEL = OneDNN()

"""Launches the kernel of `device.tokens`: x as 8-bit integers, bit for bit those of `tensors.activations`."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ....tensors.activations import bounds
from ....tensors.encoding import Activations
from .configs import options
from .device.tokens import quantize

BLOCK = 8192  # columns held in registers


@dataclass(frozen=True)
class Rounded:
    """x ≈ scale · (codes − zero).

    codes int8 [rows, columns], zeros behind the last column of x; scale, zero float32 [rows or 1, spans], each of
    `span` columns; zero is None where it is 0 everywhere.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    span: int

    def values(self, in_features: int) -> Tensor:
        """What it stands for: float32 [rows, in]."""
        codes = self.codes[:, :in_features].float()
        if self.zero is not None:
            codes -= self._spread(self.zero, in_features)
        return codes.mul_(self._spread(self.scale, in_features))

    def _spread(self, per_span: Tensor, in_features: int) -> Tensor:
        return per_span.repeat_interleave(self.span, 1)[:, :in_features]


def tokens(
    x: Tensor,
    activations: Activations,
    columns: int,
    given: tuple[Tensor, Tensor | None] | None = None,
) -> Rounded:
    """x [rows, in], contiguous, rounded as a layer reads it.

    columns: of the codes, at least `in`.  given: scale and zero point [1] of static activations, or of the tensor.
    """
    rows, in_features = x.shape
    span = min(activations.group_size, in_features) if activations.per == "group" else in_features
    spans = -(-in_features // span)
    bottom, top = bounds(activations)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    if given is None:
        scale = torch.empty(rows, spans, dtype=torch.float32, device=x.device)
        zero = None if activations.symmetric else torch.empty_like(scale)
    else:
        scale, zero = (None if t is None else t.view(1, 1) for t in given)  # type: ignore[assignment]
    block = min(BLOCK, triton.next_power_of_2(span))
    quantize[(rows, spans)](
        x,
        codes,
        scale,
        zero,
        in_features,
        columns,
        span,
        spans,
        scale.stride(0) if given is None else 0,
        BOTTOM=bottom,
        TOP=top,
        GIVEN=given is not None,
        BLOCK=block,
        **options(max(1, min(8, block // 1024))),
    )
    return Rounded(codes, scale, zero, span)

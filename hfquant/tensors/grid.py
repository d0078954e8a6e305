"""The integer grid: w ≈ scale · (code − zero_point), one (scale, zero_point) per row and group of columns."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..llvm import refused

# Rows are handled a few at a time, so that the temporaries of a fit stay this many elements.
CHUNK = 1 << 21


@dataclass(frozen=True)
class Grid:
    """Which values a weight may take.

    `bits` 1..8; `group_size` columns share one scale, -1 means the whole row; the last group of a row may be
    shorter.  `symmetric` fixes the zero point at the middle code, so that no zero points are stored.

    16 bits: not quantized.  The codes are then the values themselves, in the type that scales would be stored in, and
    scales and zero points have no columns.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    @property
    def top(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def columns(self, in_features: int) -> int:
        """Columns per group in a row of `in_features`."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    @property
    def is_float(self) -> bool:
        return self.bits == 16

    def groups(self, in_features: int) -> int:
        return 0 if self.is_float else math.ceil(in_features / self.columns(in_features))

    def expand(self, per_group: Tensor, in_features: int) -> Tensor:
        """[out, groups] -> [out, in_features]: each group's value at each of its columns."""
        return per_group.repeat_interleave(self.columns(in_features), 1)[:, :in_features]

    def fit(
        self,
        W: Tensor,
        importance: Tensor | None = None,
        *,
        search: int = 0,
        dtype: torch.dtype = torch.float16,
    ) -> tuple[Tensor, Tensor]:
        """Scales and zero points for W.

        W [out, in] float32; importance [in], the weight of a squared error in each column (for a layer with
        inputs X: diag(XXᵀ)).  With `search` = 0 the range of a group is its extremes; otherwise that many
        narrower ranges are tried and the one with the least weighted squared error kept (GPTQ's authors' `mse`
        option, with the norm 2.4 replaced by the layer's own metric).

        The scales are rounded to `dtype`, the type they are stored in, before errors are compared and before any
        code is chosen: what is packed is exactly what was simulated.

        Returns scale [out, groups] in `dtype`, zero_point [out, groups] uint8.
        """
        out_features, in_features = W.shape
        if self.is_float:
            return W.new_empty(out_features, 0, dtype=dtype), W.new_empty(out_features, 0, dtype=torch.uint8)
        columns, groups = self.columns(in_features), self.groups(in_features)
        h = torch.ones(in_features) if importance is None else importance.float()
        h = torch.nn.functional.pad(h, (0, groups * columns - in_features)).view(1, groups, columns)
        scale, zero = (
            torch.empty(out_features, groups, dtype=dtype),
            torch.empty(out_features, groups, dtype=torch.uint8),
        )
        step = max(1, CHUNK // in_features)
        for a in range(0, out_features, step):
            rows = torch.nn.functional.pad(W[a : a + step].float(), (0, groups * columns - in_features))
            s, z = self._fit_groups(rows.view(-1, groups, columns), h, search, dtype)
            scale[a : a + step], zero[a : a + step] = s, z
        return scale, zero

    def _fit_groups(self, w: Tensor, h: Tensor, search: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shrinks = torch.linspace(1.0, 0.4, search + 1) if search else torch.ones(1)
        if search and refused(w, h) is None:
            from ._search import search as generated

            if (found := generated(w, h[0], shrinks, self.bits, self.symmetric, dtype)) is not None:
                return found[0].to(dtype), found[1].to(torch.uint8)
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        best_error = torch.full_like(low, math.inf)
        best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
        for shrink in shrinks.tolist():
            scale, zero = self._range(low * shrink, high * shrink, dtype)
            if not search:
                return scale.to(dtype), zero.to(torch.uint8)
            projected = (w / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, self.top)
            projected.sub_(zero[..., None]).mul_(scale[..., None])
            error = projected.sub_(w).square_().mul_(h).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale.to(dtype), best_zero.to(torch.uint8)

    def _range(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The grid that spans [low, high], its scale already rounded to the stored type."""
        if self.symmetric:
            # Codes reach one step further below the middle than above it.  A negative scale turns the grid
            # around, so that the larger extreme always gets that extra step.
            extreme = torch.where(high > -low, high, low)
            zero = torch.full_like(low, self.middle)
            return storable(-extreme / self.middle, dtype), zero
        scale = storable((high - low) / self.top, dtype)
        return scale, (-low / scale).round().clamp(0, self.top)

    def encode(self, W: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Nearest codes.  W [out, in] -> uint8 [out, in], or the type of `scale` on a grid of 16 bits"""
        if self.is_float:
            return W.to(scale.dtype)
        n = W.shape[1]
        s, z = self.expand(scale.float(), n), self.expand(zero_point.float(), n)
        return (W / s + z).round().clamp(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """scale · (code − zero_point), in float32.  codes [out, in] -> [out, in]"""
        if self.is_float:
            return codes.float()
        n = codes.shape[1]
        s, z = self.expand(scale.float(), n), self.expand(zero_point.float(), n)
        return s * (codes.float() - z)

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.bits}{group}{'sym' if self.symmetric else ''}"


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be read back, never zero (an all-zero group) and never infinite."""
    most, smallest = torch.finfo(dtype).max, least(dtype)
    rounded = scale.clamp(-most, most).to(dtype).float()
    return torch.where(rounded.abs() < smallest, torch.full_like(rounded, smallest).copysign(scale), rounded)


def least(dtype: torch.dtype) -> float:
    """The smallest magnitude of a stored scale."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny  # fp16's normal range ends too early

"""A model whose tensors are computed from another's as they are read, one at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .headers import TensorInfo
from .source import Source

PIECE = 1 << 24  # elements that are computed together where rows do not depend on each other


@dataclass(frozen=True)
class Derived(TensorInfo):
    """A tensor that lies nowhere.

    make: (begin, end) -> its rows from begin to end, float32.  dtype: what it will be stored as; it is read in float32,
    so that it is rounded once.  file and offset are those of the tensor that it is mainly made of.
    """

    make: Callable[[int, int], Tensor]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return torch.Size(self.shape[1:]).numel()

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """`count` elements from `start` on, flat, float32."""
        end = self.numel if count is None else start + count
        begin = start // self.width
        rows = self.make(begin, -(-end // self.width))
        return rows.reshape(-1)[start - begin * self.width : end - begin * self.width]

    def load(self, dtype: torch.dtype) -> Tensor:
        step = max(1, PIECE // self.width)
        whole = torch.empty(self.shape, dtype=dtype)
        for at in range(0, self.shape[0], step):
            whole[at : at + step] = self.make(at, min(self.shape[0], at + step))
        return whole


@dataclass(frozen=True)
class Rewritten(Source):
    """A model that computes what `origin` computes, with other weights.  Its size and type are the origin's.

    about: what was done, for the report.
    """

    origin: Source = field(kw_only=True)
    about: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def parameters(self) -> int:
        return self.origin.parameters

    @property
    def total_bytes(self) -> int:
        return self.origin.total_bytes

    @property
    def dtype(self) -> torch.dtype:
        return self.origin.dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        info = self.tensors[name]
        return info.load(dtype or torch.float32) if isinstance(info, Derived) else super().read(name, dtype)

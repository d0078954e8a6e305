"""Packed components -> dense weight.  What every kernel is compared with, and the fallback of all of them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..tensors import formats
from ..tensors.encoding import Encoding
from ..tensors.formats import Extras, Format, Spec
from ..tensors.grid import Grid
from ..tensors.layer import Quantized
from . import cache

# Elements decoded at a time: the float32 temporaries of a chunk stay in the cache of a core.
CHUNK = 1 << 19


@lru_cache(maxsize=4096)
def spec(fmt: str, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype = torch.float32) -> Spec:
    """The components of a weight: name -> (shape, dtype)."""
    return formats.load(fmt).spec(encoding, shape, scale_dtype)


@lru_cache(maxsize=4096)
def component_names(fmt: str, encoding: Encoding, in_features: int) -> tuple[str, ...]:
    """The components of a format in the order in which the operators take them."""
    return tuple(spec(fmt, encoding, (1, in_features)))


@dataclass(eq=False)  # made for every call: a frozen one takes three times as long to make
class Matrix:
    """A packed weight [out, in] as the operators are given it; `index` chooses an expert of stacked parts.

    Lives as long as one call, and looks up once what was derived from its parts.
    """

    parts: Sequence[Tensor]
    fmt: Format
    encoding: Encoding
    shape: tuple[int, int]
    index: int | None = None

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def named(self) -> Mapping[str, Tensor]:
        """Components by name."""
        chosen = self.parts if self.index is None else [part[self.index] for part in self.parts]
        return dict(zip(component_names(self.fmt.name, self.encoding, self.shape[1]), chosen, strict=True))

    @property
    def extras(self) -> Extras:
        """What is stored beside the weights, as it is."""
        return self.fmt.extras(self.named, self.encoding)

    @property
    def trackable(self) -> bool:
        """Whether what is derived from the parts can be kept: a change of them would be noticed."""
        return cache.trackable(self.parts)

    @cached_property
    def entry(self) -> cache.Entry:
        return cache.entry(self.parts)

    def derive(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned for this key and weight before.  It must not refer to the parts."""
        return self.entry.derive(key if self.index is None else (key, self.index), make)

    def check(self) -> None:
        """Raises ShapeError if the parts are not those of such a weight."""
        scales = next((part.dtype for part in self.parts if part.is_floating_point()), torch.float32)
        found = spec(self.fmt.name, self.encoding, self.shape, scales)
        expected = {name: shape for name, (shape, _) in found.items()}
        stacked = () if self.index is None else (self.parts[0].shape[0],)
        given = [tuple(part.shape) for part in self.parts]
        if given != [(*stacked, *shape) for shape in expected.values()]:
            raise ShapeError(
                f"a weight {list(self.shape)} stored as {self.fmt.name} {self.encoding} has components {expected}, "
                f"not {given}",
                "the input, or the number of outputs, is not that of this layer",
            )

    def quantized(self) -> Quantized:
        """All that is stored."""
        return self.fmt.unpack(self.named, self.encoding, self.shape)

    def base(self) -> Quantized:
        """The weights alone, without a mask.  Of sparse ones the codes are remembered: to place them takes long."""
        if self.encoding.sparsity is None:
            return self.quantized().base
        kept: _Kept = self.derive("base", lambda: _Kept(self.quantized().base.filled))
        return kept.Q

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in], with all that changes the weight."""
        return dense(self.quantized(), dtype)


@dataclass(frozen=True)
class _Kept:
    Q: Quantized

    @property
    def nbytes(self) -> int:
        return self.Q.codes.nbytes


def dense(Q: Quantized, dtype: torch.dtype) -> Tensor:
    """`Q.dequantize().to(dtype)` without its float32 copies of the whole matrix; bit for bit but for a low rank.

    Returns [out, in] in `dtype`.
    """
    out_features, in_features = Q.shape
    W = torch.empty(out_features, in_features, dtype=dtype, device=Q.codes.device)
    step = max(1, CHUNK // max(in_features, 1))
    for a in range(0, out_features, step):
        part = Q.rows(slice(a, a + step))
        rows = _decode(part.codes, part.scale, part.zero_point, part.grid)
        if part.mask is not None:
            rows = rows * part.mask
        if part.low_rank is not None:
            rows = rows + part.low_rank.dense()
        W[a : a + step] = rows if part.input_scale is None else rows / part.input_scale
    return W


def _decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    columns = grid.columns(codes.shape[1])
    if grid.is_float or codes.shape[1] % columns:
        return grid.decode(codes, scale, zero)
    grouped = codes.float().unflatten(1, (-1, columns))
    return grouped.sub_(zero[..., None]).mul_(scale[..., None].float()).flatten(1)

"""Packed components -> dense weight.  What every kernel is compared with, and the fallback of all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors.formats import Format
from ..tensors.grid import Grid
from ..tensors.layer import Quantized

# Elements decoded at a time: the float32 temporaries of a chunk stay in the cache of a core.
CHUNK = 1 << 19


def component_names(fmt: Format, grid: Grid, in_features: int) -> tuple[str, ...]:
    """The components of a format in the order in which the operators take them."""
    return tuple(fmt.spec(grid, (1, in_features), torch.float32))


def unpack(fmt: Format, grid: Grid, parts: Sequence[Tensor], shape: tuple[int, int]) -> Quantized:
    """Components in `component_names` order -> the weight [out, in] on its grid."""
    return fmt.unpack(dict(zip(component_names(fmt, grid, shape[1]), parts, strict=True)), grid, shape)


def dense(Q: Quantized, dtype: torch.dtype) -> Tensor:
    """`Q.dequantize().to(dtype)`, bit for bit, without its float32 copies of the whole matrix.

    Returns [out, in] in `dtype`.
    """
    out_features, in_features = Q.shape
    W = torch.empty(out_features, in_features, dtype=dtype, device=Q.codes.device)
    step = max(1, CHUNK // max(in_features, 1))
    for a in range(0, out_features, step):
        rows = slice(a, a + step)
        W[rows] = _decode(Q.codes[rows], Q.scale[rows], Q.zero_point[rows], Q.grid)
    return W


def _decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    columns = grid.columns(codes.shape[1])
    if codes.shape[1] % columns:
        return grid.decode(codes, scale, zero)
    grouped = codes.float().unflatten(1, (-1, columns))
    return grouped.sub_(zero[..., None]).mul_(scale[..., None].float()).flatten(1)

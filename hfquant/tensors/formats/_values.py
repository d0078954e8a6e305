"""The values of a weight and the places they stand in, as the native format stores them.

  all weights          weight int8 [out, words, 4]    the codes of each row
  n of every m         weight int8 [out, words, 4]    the kept codes of each row, in order
                       weight_index uint8 [out, ·]    m ≤ 8: the number of the choice, `packing.pack_choices`
                       weight_mask uint8 [out, in/8]  m > 8: a bit per weight
  n anywhere           weight int8 [1, words, 4]      the kept codes of all rows, one after the other
                       weight_mask uint8 [out, in/8]  a bit per weight

Codes are packed as planes; on a grid of 16 bits they are the values themselves, padded to whole words.

Two of four at 4 bit take 2 bits for the codes and 3/4 for their places: 2.75 bits per weight instead of 4.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoding import Encoding, Sparsity
from ..grid import Grid
from ..layer import Quantized
from ..packing import (
    index_bits,
    pack_choices,
    pack_mask,
    pack_planes,
    plane_words,
    unpack_choices,
    unpack_mask,
    unpack_planes,
)
from . import Spec

NUMBERED = 8  # the largest m whose choices have numbers of their own
WORD = 4  # bytes


def refuses(sparsity: Sparsity | None, shape: tuple[int, int], kind: str) -> str | None:
    """Why these places cannot be stored; None if they can."""
    if sparsity is None:
        return None
    if not sparsity.m and kind in ("experts", "embedding"):
        return f"{kind} need as many weights in every row: use a pattern such as 2of4"
    if sparsity.m and shape[1] % sparsity.m:
        return f"{sparsity.m} does not divide {shape[1]} columns"
    return None


def spec(encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
    """Component name -> (shape, dtype) of values and places."""
    rows, count = _layout(encoding.sparsity, shape)
    grid = encoding.grid
    words = math.ceil(count * scale_dtype.itemsize / WORD) if grid.is_float else plane_words(count, grid.bits)
    found: Spec = {"weight": ((rows, words, WORD), torch.int8)}
    if (places := encoding.sparsity) is None:
        return found
    if _numbered(places):
        octets = WORD * plane_words(shape[1] // places.m, index_bits(places.n, places.m))
        found["weight_index"] = ((shape[0], octets), torch.uint8)
    else:
        found["weight_mask"] = ((shape[0], math.ceil(shape[1] / 8)), torch.uint8)
    return found


def _layout(sparsity: Sparsity | None, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows of values and values in each."""
    if sparsity is None:
        return shape
    return (shape[0], shape[1] // sparsity.m * sparsity.n) if sparsity.m else (1, sparsity.n)


def _numbered(sparsity: Sparsity) -> bool:
    return 0 < sparsity.m <= NUMBERED


def pack(Q: Quantized) -> dict[str, Tensor]:
    """Component name -> tensor.  Raises ValueError where the mask is not the pattern that Q says it is."""
    places = Q.encoding.sparsity
    if places is None or Q.mask is None:
        return {"weight": _pack_codes(Q.codes, Q.grid)}
    if places.m and (Q.mask.unflatten(1, (-1, places.m)).sum(2) != places.n).any():
        raise ValueError(f"the mask does not keep {places.n} of every {places.m}")
    kept = Q.codes[Q.mask].view(*_layout(places, Q.shape))
    packed = {"weight": _pack_codes(kept, Q.grid)}
    if _numbered(places):
        packed["weight_index"] = pack_choices(Q.mask, places.n, places.m).view(torch.uint8)
    else:
        packed["weight_mask"] = pack_mask(Q.mask)
    return packed


def unpack(
    parts: Mapping[str, Tensor], encoding: Encoding, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """-> codes [out, in], of `dtype` on a grid of 16 bits, and the mask.  Codes that are not kept are 0."""
    places, grid = encoding.sparsity, encoding.grid
    codes = _unpack_codes(parts["weight"], grid, _layout(places, shape)[1], dtype)
    if places is None:
        return codes, None
    if _numbered(places):
        mask = unpack_choices(aligned(parts["weight_index"]).view(torch.int32), places.n, places.m, shape[1])
    else:
        mask = unpack_mask(parts["weight_mask"], shape[1])
    return codes.new_zeros(shape).masked_scatter_(mask, codes), mask


def _pack_codes(codes: Tensor, grid: Grid) -> Tensor:
    """[rows, count] -> int8 [rows, words, 4]"""
    if not grid.is_float:
        return pack_planes(codes, grid.bits).view(torch.int8).unflatten(1, (-1, WORD))
    octets = codes.contiguous().view(torch.int8)
    return F.pad(octets, (0, -octets.shape[1] % WORD)).unflatten(1, (-1, WORD))


def _unpack_codes(packed: Tensor, grid: Grid, count: int, dtype: torch.dtype) -> Tensor:
    words = aligned(packed).flatten(1)
    if grid.is_float:
        return words.view(dtype)[:, :count]
    return unpack_planes(words.view(torch.int32), grid.bits, count)


def aligned(packed: Tensor) -> Tensor:
    """Contiguous, and beginning on a word: a slice of a memory-mapped file need not."""
    packed = packed.contiguous()
    return packed.clone() if packed.storage_offset() % WORD else packed

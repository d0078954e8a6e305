"""Codes of 1 to 8 bits in int32 words: dense bit streams, and bit planes; which weights are kept, as bits.

A stream is what compressed-tensors and GPTQ store: code i occupies bits i·b .. i·b + b − 1 of its row, least
significant first, so a 3-bit code may straddle two words.  Planes are what hfquant's native format stores: a
code of odd width is split into parts of 4, 2 and 1 bits (5 = 4 + 1), each part a stream of its own, and no part
ever straddles a byte.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32

# (words, widths of the planes in every row, codes of a row) -> codes, or None: the same as below in machine code, where
# `runtime` has some for this machine
faster: Callable[[Tensor, tuple[int, ...], int], Tensor | None] | None = None


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes of `bits` bits."""
    return math.ceil(count * bits / WORD)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, ⌈n·bits/32⌉]"""
    rows, n = codes.shape
    if WORD % bits == 0:  # no code straddles: shift whole fields
        per = WORD // bits
        fields = F.pad(codes, (0, -n % per)).reshape(rows, -1, per)
        packed = torch.zeros(fields.shape[:2], dtype=torch.int32)
        for i in range(per):
            packed |= fields[..., i].to(torch.int32) << (i * bits)
        return packed
    one_bit = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    return pack_stream(one_bit.reshape(rows, n * bits), 1)


def unpack_stream(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_stream`.  int32 [rows, words] -> uint8 [rows, n]"""
    if faster is not None and (found := faster(packed, (bits,), n)) is not None:
        return found
    # Bytes rather than words (little-endian, so in stream order): a quarter of the memory traffic.
    octets = packed.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        return _spread(octets, bits)[:, :n]
    mask = 2**bits - 1
    octets = F.pad(octets, (0, -octets.shape[1] % bits)).unflatten(1, (-1, bits))  # 8 codes in every `bits` bytes
    codes = []
    for i in range(8):
        byte, at = divmod(i * bits, 8)
        code = octets[..., byte] >> at
        if at + bits > 8:
            code = code | (octets[..., byte + 1] << (8 - at))
        codes.append(code & mask)
    return torch.stack(codes, -1).flatten(1)[:, :n]


# (shift, mask) that double the room of every field of a byte until each has a byte of its own
_SPREAD = {
    8: (torch.uint8, ()),
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


def _spread(octets: Tensor, bits: int) -> Tensor:
    """Fields of 1, 2, 4 or 8 bits to bytes.  uint8 [rows, n] -> uint8 [rows, n·8/bits]"""
    dtype, steps = _SPREAD[bits]
    wide = octets.to(dtype, copy=True)  # never a view of what is packed
    for shift, mask in steps:
        wide = (wide | (wide << shift)).bitwise_and_(mask)
    return wide.view(torch.uint8)


def planes(bits: int) -> tuple[int, ...]:
    """The widths a code is split into, lowest bits first: 8 = 4 + 4, 7 = 4 + 2 + 1, 5 = 4 + 1, 3 = 2 + 1."""
    parts: list[int] = []
    while bits:
        part = next(width for width in (4, 2, 1) if width <= bits)
        parts.append(part)
        bits -= part
    return tuple(parts)


def plane_words(count: int, bits: int) -> int:
    """int32 words of `pack_planes` for a row of `count` codes."""
    return sum(words(count, width) for width in planes(bits))


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, plane_words(n, bits)], the low plane of a row first."""
    packed, shift = [], 0
    for width in planes(bits):
        packed.append(pack_stream((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(packed, 1)


def unpack_planes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_planes`.  int32 [rows, words] -> uint8 [rows, n]"""
    if faster is not None and (found := faster(packed, planes(bits), n)) is not None:
        return found
    codes = torch.zeros(packed.shape[0], n, dtype=torch.uint8, device=packed.device)
    at, shift = 0, 0
    for width in planes(bits):
        size = words(n, width)
        codes |= unpack_stream(packed[:, at : at + size], width, n) << shift
        at, shift = at + size, shift + width
    return codes


def pack_mask(mask: Tensor) -> Tensor:
    """bool [rows, n] -> uint8 [rows, ⌈n/8⌉]: one bit per weight, the first in the lowest bit."""
    octets = pack_stream(mask.to(torch.uint8), 1).view(torch.uint8)
    return octets[:, : math.ceil(mask.shape[1] / 8)].contiguous()


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_mask`.  uint8 [rows, ⌈n/8⌉] -> bool [rows, n]"""
    return _spread(packed.contiguous(), 1)[:, :n].bool()


def index_bits(n: int, m: int) -> int:
    """Bits that say which n of m are kept: 3 for 2 of 4, which can be so in six ways."""
    return max(1, (math.comb(m, n) - 1).bit_length())


@lru_cache
def choices(n: int, m: int) -> Tensor:
    """Every way to keep n of m, in the order in which they are numbered.  bool [C(m, n), m]"""
    places = list(combinations(range(m), n))
    table = torch.zeros(len(places), m, dtype=torch.bool)
    return table.scatter_(1, torch.tensor(places), True)


def pack_choices(mask: Tensor, n: int, m: int) -> Tensor:
    """Which n of each m are kept, as the number of the choice.  m ≤ 8.

    mask bool [rows, k·m], n True in every m -> int32 [rows, plane_words(k, index_bits(n, m))]
    """
    value = 2 ** torch.arange(m)
    number = torch.zeros(2**m, dtype=torch.uint8)
    number[(choices(n, m) * value).sum(1)] = torch.arange(math.comb(m, n), dtype=torch.uint8)
    return pack_planes(number[(mask.unflatten(1, (-1, m)) * value).sum(2)], index_bits(n, m))


def unpack_choices(packed: Tensor, n: int, m: int, columns: int) -> Tensor:
    """The inverse of `pack_choices`.  int32 [rows, words] -> bool [rows, columns]"""
    chosen = unpack_planes(packed, index_bits(n, m), columns // m).int()
    return choices(n, m).to(packed.device)[chosen].flatten(1)

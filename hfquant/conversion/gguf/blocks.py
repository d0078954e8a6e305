"""Weights in ggml's block types, exactly: the codes and scales are those that were found, nothing is rounded again.

Each type is a promise of the form w = d · q, or w = d · c − m, for runs of 32 weights; the types named K tell it of
eight or sixteen runs together, with integer factors on d and m.  Here those factors are 1 and the zero point, which
makes K types exact wherever 256 weights share a scale.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type

from ...errors import ExportError
from ...tensors.layer import Quantized

Array = npt.NDArray[Any]
Bytes = Array  # uint8
BLOCK, SUPER = 32, 256
HALF = np.dtype("<f2")


@dataclass(frozen=True)
class Runs:
    """A weight [out, in] in runs of 32 columns.

    code: uint8 [out, in/32, 32], zero, scale: [out, in/32], and the same for runs of 256 where a scale is shared by as
    many, else None.  q: code − zero, int16 [out, in/32, 32].
    """

    code: Array
    zero: Array
    scale: Array
    wide: bool

    @property
    def q(self) -> Array:
        found: Array = self.code.astype(np.int16) - self.zero[..., None]
        return found

    @property
    def offset(self) -> Array:
        """What is added to d · code: −scale · zero, exact in float32."""
        return -self.scale * self.zero.astype(np.float32)

    @property
    def d(self) -> Bytes:
        return _half(self.scale)

    def supers(self, per_run: Array) -> Array:
        """[out, in/32, ...] -> the first of every eight [out, in/256, ...]"""
        return per_run[:, :: SUPER // BLOCK]


def runs(Q: Quantized, name: str) -> Runs:
    """Raises ExportError for groups that are no runs of 32 columns, and scales that half precision cannot hold."""
    Q, columns = _detached(Q.filled), Q.shape[1]
    group = Q.grid.columns(columns)
    if columns % BLOCK:
        raise ExportError(
            f"gguf cannot store {name}: its rows have {columns} columns, no multiple of {BLOCK}",
            "leave it as it is (`--set 'overrides.*.NAME=null'` when compressing), or use `--to dense`",
        )
    if group % BLOCK and group != columns:
        raise ExportError(
            f"gguf cannot store {name}: its types share a scale between {BLOCK} columns, not {group} of {columns}",
            f"use groups of {BLOCK} or a multiple of it, or `--to dense`",
        )
    half = Q.scale.to(torch.float16)
    if not torch.equal(half.float(), Q.scale.float()):
        raise ExportError(
            f"gguf stores scales in float16, which cannot hold those of {name} exactly",
            "compress again with `--set dtype=float16`, or use `--to dense`",
        )
    at = torch.arange(0, columns, BLOCK) // group
    code = Q.codes.numpy().reshape(Q.shape[0], -1, BLOCK)
    scale, zero = Q.scale.float()[:, at].numpy(), Q.zero_point[:, at].numpy().astype(np.int16)
    return Runs(code, zero, scale, wide=columns % SUPER == 0 and (group % SUPER == 0 or group == columns))


def _detached(Q: Quantized) -> Quantized:
    """The same, of tensors that numpy takes: a loaded scale may be a parameter."""
    return replace(Q, codes=Q.codes.detach(), scale=Q.scale.detach(), zero_point=Q.zero_point.detach())


def pack(Q: Quantized, name: str) -> tuple[Type, Bytes]:
    """The smallest type that holds a weight exactly, and its bytes [out, bytes per row].

    Raises ExportError where there is none.
    """
    found = runs(Q, name)
    for kind, (fits, make) in TYPES.items():
        if fits(found):
            packed: Bytes = np.ascontiguousarray(make(found).reshape(Q.shape[0], -1))
            return kind, packed
    low, high = int(found.q.min()), int(found.q.max())
    raise ExportError(
        f"gguf has no type for {name}: its codes reach from {low} to {high} around zero, -128 to 127 are possible",
        "use a symmetric grid or fewer bits, or `--to dense`",
    )


def exact(kind: Type, packed: Bytes, Q: Quantized) -> bool:
    """Whether the library that readers use decodes this to the very same weights."""
    return bool(np.array_equal(gguf.dequantize(packed, kind), Q.filled.dequantize().detach().numpy()))


def _within(low: int, high: int) -> Callable[[Runs], bool]:
    return lambda r: low <= int(r.q.min()) and int(r.q.max()) <= high


def _offset(top: int) -> Callable[[Runs], bool]:
    """Codes that fit, and offsets that are exact in half precision: of 15 bits, 11 may be kept."""

    def fits(r: Runs) -> bool:
        exactly: Array = r.offset.astype(HALF).astype(np.float32)
        return int(r.code.max()) <= top and bool(np.array_equal(exactly, r.offset))

    return fits


def _wide(top: int) -> Callable[[Runs], bool]:
    return lambda r: r.wide and int(r.code.max()) <= top


def _wide_symmetric(low: int, high: int) -> Callable[[Runs], bool]:
    return lambda r: r.wide and _within(low, high)(r)


def _half(x: Array) -> Bytes:
    """[...] -> bytes [..., 2]"""
    return np.ascontiguousarray(x.astype(HALF))[..., None].view(np.uint8)


def _nibbles(u: Array) -> Bytes:
    """[..., 32] -> [..., 16]: element j below element j + 16."""
    return (u[..., :16] & 15) | ((u[..., 16:] & 15) << 4)


def _fifth(u: Array) -> Bytes:
    """The fifth bits of 32 codes as one little-endian word of 4 bytes."""
    return np.packbits(u >> 4 & 1, axis=-1, bitorder="little")


def _q8_0(r: Runs) -> Bytes:
    return np.concatenate([r.d, r.q.astype(np.int8).view(np.uint8)], -1)


def _q4_0(r: Runs) -> Bytes:
    return np.concatenate([r.d, _nibbles((r.q + 8).astype(np.uint8))], -1)


def _q4_1(r: Runs) -> Bytes:
    return np.concatenate([r.d, _half(r.offset), _nibbles(r.code)], -1)


def _q5_0(r: Runs) -> Bytes:
    u = (r.q + 16).astype(np.uint8)
    return np.concatenate([r.d, _fifth(u), _nibbles(u)], -1)


def _q5_1(r: Runs) -> Bytes:
    return np.concatenate([r.d, _half(r.offset), _fifth(r.code), _nibbles(r.code)], -1)


def _superblocks(r: Runs, u: Array) -> tuple[Array, Bytes, Array]:
    """Codes [out, in/256, 256], d as bytes, and the zero point [out, in/256, 1]."""
    wide = u.reshape(u.shape[0], -1, SUPER)
    zero = r.supers(r.zero).astype(np.uint8)[..., None]
    return wide, np.ascontiguousarray(r.supers(r.d)).astype(np.uint8), zero


def _quarters(u: Array) -> Bytes:
    """Two bits each [..., 256] -> [..., 64]: in each half, four runs of 32 beside each other in a byte."""
    parts = u.reshape(*u.shape[:-1], 2, 4, 32) & 3
    shifted = parts << (2 * np.arange(4, dtype=np.uint8))[:, None]
    joined: Bytes = np.bitwise_or.reduce(shifted, axis=-2)
    return joined.reshape(*u.shape[:-1], 64)


def _pairs(u: Array) -> Bytes:
    """Four bits each [..., 256] -> [..., 128]: a run of 32 below the next."""
    parts = u.reshape(*u.shape[:-1], 4, 2, 32) & 15
    joined: Bytes = parts[..., 0, :] | (parts[..., 1, :] << 4)
    return joined.reshape(*u.shape[:-1], 128)


def _factors(zero: Array) -> Bytes:
    """The twelve bytes of eight 6-bit factors of 1 for d, and as many for m that are all the zero point.  [..., 12]"""
    one = np.ones_like(zero)
    high = zero >> 4 << 6
    parts = [one] * 4 + [(zero & 63) | high] * 4 + [one | ((zero & 15) << 4)] * 4
    return np.concatenate(parts, -1)


def _q2_k(r: Runs) -> Bytes:
    code, d, zero = _superblocks(r, r.code)
    factors = np.repeat(1 | (zero << 4), 16, axis=-1)
    return np.concatenate([factors, _quarters(code), d, d], -1)


def _q3_k(r: Runs) -> Bytes:
    u, d, _ = _superblocks(r, (r.q + 4).astype(np.uint8))
    high = (u >> 2 & 1).reshape(*u.shape[:-1], 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    mask: Bytes = np.bitwise_or.reduce(high, axis=-2)
    # sixteen factors of 33 − 32 = 1: low four bits 1 in eight bytes, two high bits 2 in four
    factors = np.concatenate([np.full((*u.shape[:-1], 8), 0x11), np.full((*u.shape[:-1], 4), 0xAA)], -1)
    return np.concatenate([mask, _quarters(u), factors.astype(np.uint8), d], -1)


def _q4_k(r: Runs) -> Bytes:
    code, d, zero = _superblocks(r, r.code)
    return np.concatenate([d, d, _factors(zero), _pairs(code)], -1)


def _q5_k(r: Runs) -> Bytes:
    code, d, zero = _superblocks(r, r.code)
    high = (code >> 4 & 1).reshape(*code.shape[:-1], 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    fifth: Bytes = np.bitwise_or.reduce(high, axis=-2)
    return np.concatenate([d, d, _factors(zero), fifth, _pairs(code)], -1)


def _q6_k(r: Runs) -> Bytes:
    u, d, _ = _superblocks(r, (r.q + 32).astype(np.uint8))
    halves = u.reshape(*u.shape[:-1], 2, 4, 32)
    low = np.concatenate([halves[..., :2, :] & 15 | (halves[..., 2:, :] & 15) << 4], -1)
    factors = np.ones((*u.shape[:-1], 16), np.uint8)
    return np.concatenate([low.reshape(*u.shape[:-1], 128), _quarters(u >> 4), factors, d], -1)


# by bits per weight: 2.6, 3.4, 4.5, 4.5, 5, 5.5, 5.5, 6, 6.6, 8.5
TYPES: dict[Type, tuple[Callable[[Runs], bool], Callable[[Runs], Bytes]]] = {
    Type.Q2_K: (_wide(3), _q2_k),
    Type.Q3_K: (_wide_symmetric(-4, 3), _q3_k),
    Type.Q4_0: (_within(-8, 7), _q4_0),
    Type.Q4_K: (_wide(15), _q4_k),
    Type.Q4_1: (_offset(15), _q4_1),
    Type.Q5_0: (_within(-16, 15), _q5_0),
    Type.Q5_K: (_wide(31), _q5_k),
    Type.Q5_1: (_offset(31), _q5_1),
    Type.Q6_K: (_wide_symmetric(-32, 31), _q6_k),
    Type.Q8_0: (_within(-128, 127), _q8_0),
}

"""What `tensors.packing` and `reference.dense` do in torch, in machine code: number for number the same."""

from array import array
from functools import cache

import torch
from torch import Tensor

from ...llvm import engine
from ...llvm.machine import Level
from ...tensors import packing
from ...tensors.layer import Quantized
from .layout import address
from .records import KINDS
from .unpacking import Decode, Unpack, decoder, unpacker

WORTH = 1 << 14  # codes, below which torch is as quick


@cache
def accelerate(level: Level) -> None:
    """From now on packed codes of some size are unpacked by generated code."""

    def unpack(packed: Tensor, widths: tuple[int, ...], count: int) -> Tensor | None:
        ordinary = type(packed) in (Tensor, torch.nn.Parameter) and packed.device.type == "cpu"
        if not ordinary or packed.shape[0] * count < WORTH:
            return None
        return unpacked(level, packed.contiguous(), widths, count)

    packing.faster = unpack


def unpacked(level: Level, packed: Tensor, widths: tuple[int, ...], count: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, count]: planes of these widths, one after the other in every row"""
    rows = packed.shape[0]
    codes = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    offsets, at = array("q"), 0
    for width in widths:
        offsets.append(4 * at)
        at += packing.words(count, width)
    record = array("q", [0] * len(Unpack))
    record[Unpack.WORDS], record[Unpack.ROW], record[Unpack.ROWS] = packed.data_ptr(), 4 * packed.shape[1], rows
    record[Unpack.COUNT], record[Unpack.CODES], record[Unpack.OFFSETS] = count, codes.data_ptr(), address(offsets)
    engine.call(engine.function(level, f"unpack {widths}", "unpack", lambda code: unpacker(code, widths)), record)
    return codes


def dense(level: Level, Q: Quantized, dtype: torch.dtype) -> Tensor:
    """`reference.dense` of weights alone.  [out, in] in `dtype`"""
    out_features, in_features = Q.shape
    codes, scale = Q.codes.contiguous(), Q.scale.contiguous()
    zeros = None if Q.grid.symmetric else Q.zero_point.contiguous()
    W = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    record = array("q", [0] * len(Decode))
    record[Decode.CODES], record[Decode.ROWS], record[Decode.COLUMNS] = codes.data_ptr(), out_features, in_features
    record[Decode.GROUP], record[Decode.GROUPS] = Q.grid.columns(in_features), scale.shape[1]
    record[Decode.SCALES], record[Decode.ZEROS] = scale.data_ptr(), 0 if zeros is None else zeros.data_ptr()
    record[Decode.MIDDLE], record[Decode.KIND], record[Decode.DENSE] = Q.grid.middle, KINDS[dtype], W.data_ptr()
    kind = str(scale.dtype).removeprefix("torch.")
    engine.call(engine.function(level, f"decode {kind}", "decode", lambda code: decoder(code, kind)), record)
    return W

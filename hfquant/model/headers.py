"""Tensors of safetensors files, known by the files' headers before any is read."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

PIECE = 1 << 22  # elements that are converted at a time


def read_bytes(file: Path, offset: int, count: int) -> Tensor:
    """uint8 [count], in memory that torch aligned: matrix products may round otherwise when it is not."""
    raw = torch.empty(count, dtype=torch.uint8)
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        view, done = raw.numpy().data, 0
        while done < count:
            got = opened.readinto(view[done:])
            if not got:
                raise SourceError(f"{file.name} ended early", "the file changed while it was read")
            done += got
    return raw


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, from its file's header."""

    file: Path
    offset: int  # of its first byte in the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """`count` elements from `start` on, flat, in memory of their own: no mapping keeps the file resident."""
        count = self.numel - start if count is None else count
        size = self.dtype.itemsize
        return read_bytes(self.file, self.offset + start * size, count * size).view(self.dtype)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The whole tensor, in that type and its own shape.

        Converted piece by piece, so that not both are in memory as a whole.
        """
        if dtype == self.dtype or self.numel <= PIECE:
            return self.read().view(self.shape).to(dtype)
        found = torch.empty(self.numel, dtype=dtype)
        for start in range(0, self.numel, PIECE):
            count = min(PIECE, self.numel - start)
            found[start : start + count] = self.read(start, count)
        return found.view(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, without reading them.

    Raises SourceError if the file is truncated, or its header says what cannot be.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise _damaged(file, "its header is incomplete")
        try:
            header = json.loads(f.read(length))
        except ValueError as error:
            raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header names no tensors")
    header.pop("__metadata__", None)
    found, end = {}, 0
    for name, entry in header.items():
        found[name], last = _entry(file, name, entry, 8 + length)
        end = max(end, last)
    if 8 + length + end != size:
        raise _damaged(file, f"{8 + length + end:,} bytes are promised, {size:,} are there")
    return found


def _entry(file: Path, name: str, entry: Any, data: int) -> tuple[TensorInfo, int]:
    """The tensor that one entry of a header speaks of, and where it ends, counted from `data`."""
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(file, f"its header does not say where {name} lies") from error
    if kind not in DTYPES:
        raise SourceError(f"{file.name}: {name} has the type {kind}, which torch cannot hold")
    info = TensorInfo(file, data + begin, DTYPES[kind], shape)
    if not sound or end - begin != info.nbytes:
        raise _damaged(file, f"{name} is said to be {list(shape)} of {kind}, which is not what lies there")
    return info, end


def _damaged(file: Path, why: str) -> SourceError:
    return SourceError(f"{file.name} is truncated or damaged: {why}", "download this file again")

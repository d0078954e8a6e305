"""Safetensors files written tensor by tensor: one tensor in memory, the safetensors library's own bytes.

The header needs shapes and types only, so it is written before any tensor exists.  After it each tensor has
its place: they may arrive in any order, the file is the same.  It gets its name once complete and on disk.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..errors import CheckpointError

# The library's names in the library's order: it stores the last of these types first, and then by name.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}
BUG = "this is a bug in hfquant: please report it with the command you ran"


class Entry(NamedTuple):
    """A tensor of a file to be written: what the header says of it, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)


def nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a tensor of this shape and type takes."""
    return int(torch.Size(shape).numel()) * dtype.itemsize


class ShardWriter:
    """One safetensors file: announced in full, filled with `put` in any order, complete when the `with` ends.

    `tensors` is {name: (shape, dtype)}.  Until then the bytes are in `<path>.tmp`, which is removed if the
    `with` block raises.  Raises CheckpointError on a tensor that was not announced so, comes twice, or is
    missing at the end.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        metadata: Mapping[str, str] = METADATA,
    ) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self._tensors = {name: (tuple(shape), dtype) for name, (shape, dtype) in tensors.items()}
        self._missing = set(self._tensors)
        header, self._offset, self.size = layout(self._tensors, metadata)
        self._file = self.temporary.open("wb")
        self._file.truncate(self.size)
        self._file.write(header)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        shape, dtype = self._tensors.get(name, ((), None))
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype) or name not in self._missing:
            said = "nothing" if dtype is None else f"{list(shape)} {dtype}, once"
            got = f"{list(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"{self.path.name} was to hold {said} as `{name}`, but was given {got}", BUG)
        self._missing.discard(name)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._offset[name])
        self._file.write(raw.data)

    def close(self) -> None:
        """Make the file durable, and only then give it its name."""
        if self._missing:
            self.discard()
            lacks = f"{len(self._missing)} tensors, the first is `{min(self._missing)}`"
            raise CheckpointError(f"{self.path.name} lacks {lacks}", BUG)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.temporary.replace(self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def layout(
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """-> (header bytes with their length in front, name -> offset in the file, size of the file)."""
    order = sorted(tensors, key=lambda name: (-RANK[tensors[name][1]], name.encode()))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start, begin = 0, {}
    for name in order:
        shape, dtype = tensors[name]
        end = start + nbytes(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        begin[name], start = start, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin[name] for name in order}, len(head) + start


def sync(folder: Path) -> None:
    """Make the names in a folder durable, not only the bytes behind them."""
    if os.name == "nt":  # where a folder cannot be opened, and a rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] = METADATA) -> None:
    """Write one safetensors file, making its tensors one after the other in the order given.

    Raises CheckpointError if a tensor is not what its entry says, or if a name comes twice.
    """
    listed = list(entries)
    announced = {entry.name: (entry.shape, entry.dtype) for entry in listed}
    with ShardWriter(path, announced, metadata) as writer:
        for entry in listed:
            writer.put(entry.name, entry.make())


def split(entries: Iterable[Entry], max_shard_size: int) -> list[list[Entry]]:
    """Fill shards in the order given; a tensor greater than a shard gets one of its own."""
    shards: list[list[Entry]] = [[]]
    room = max_shard_size
    for entry in entries:
        if shards[-1] and entry.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The file names of a checkpoint of so many shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, Iterable[Entry]]) -> None:
    """Write the index that says which file holds which tensor: {file name: its entries}."""
    weight_map, size = {}, 0
    for file, entries in shards.items():
        for entry in entries:
            weight_map[entry.name] = file
            size += entry.nbytes
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True)
    write_text(folder / INDEX, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either there in full or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_checkpoint(
    folder: Path,
    plan: Iterable[Entry],
    max_shard_size: int = 5_000_000_000,
    metadata: Mapping[str, str] = METADATA,
) -> list[Path]:
    """Write `model.safetensors`, or shards and their index, into a folder that exists -> files written.

    The order of the plan decides which tensors share a shard, as in `save_pretrained`.  Raises
    CheckpointError if a tensor is not what its entry says, or if a name comes twice.
    """
    shards = split(plan, max_shard_size)
    named = dict(zip(shard_names(len(shards)), shards, strict=True))
    for file, entries in named.items():
        write_shard(folder / file, entries, metadata)
    if len(shards) > 1:  # last: an index that is there promises that the shards are
        write_index(folder, named)
    return [folder / file for file in named] + ([folder / INDEX] if len(shards) > 1 else [])

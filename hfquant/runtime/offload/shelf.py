"""KV cache in files: the keys and values of one layer are in memory only while that layer runs.

A layer that is on disk keeps tensors on the meta device in the place of its keys and values, so that whoever asks
for lengths and masks gets the right answer.  In the file tokens follow one another ([seq, batch, heads, dim]), so
that a new one is appended; a sliding window, which loses tokens at its front, is written anew.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..kv_cache import CompressedLayer
from .pieces import room
from .reader import Reader
from .scratch import Region, Regions, Scratch, write_all

NAMES = ("keys", "values")
WRITES = 2  # that may be under way


def names(layer: DynamicLayer) -> tuple[str, ...]:
    """The tensors that a layer holds, all [batch, heads, ., .]."""
    packed = layer.packed if isinstance(layer, CompressedLayer) and layer.past else ()
    return (*NAMES, *packed)


def only_grows(layer: DynamicLayer, name: str) -> bool:
    """Whether what is once in this tensor stays where it is."""
    return name not in NAMES if isinstance(layer, CompressedLayer) else not layer.is_sliding


@dataclass
class _Stored:
    """One tensor on disk: `held` tokens, in a part of the file."""

    region: Region | None = None
    held: int = 0
    shape: tuple[int, ...] = ()  # [batch, heads, seq, dim] as the layer knows it
    dtype: torch.dtype = torch.float32
    reading: "tuple[list[Future[Any]], Tensor] | None" = None
    writing: "Future[Any] | None" = None

    @property
    def stride(self) -> int:
        """Bytes of one token."""
        batch, heads, _, dim = self.shape
        return batch * heads * dim * self.dtype.itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether tokens of this tensor are like those that are there: as many sequences, heads and channels."""
        return (*self.shape[:2], self.shape[3]) == (*tensor.shape[:2], tensor.shape[3])


@dataclass
class Shelf:
    """Puts layers of caches into files and takes them out.  tokens: how long a sequence can become."""

    scratch: Scratch
    tokens: int
    bytes_read: int = 0
    bytes_written: int = 0
    _stored: dict[tuple[int, str], _Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader, self._regions = Reader(2, "hfquant-kv"), Regions(self.scratch)
        self._writes: deque[_Stored] = deque()  # on their way: each holds what it writes in memory

    def prefetch(self, layers: Sequence[DynamicLayer]) -> None:
        """Start reading."""
        for layer in layers:
            for name in names(layer):
                stored = self._stored.get((id(layer), name))
                if stored is not None and stored.reading is None and getattr(layer, name).is_meta:
                    self._read(stored)

    def take(self, layers: Sequence[DynamicLayer]) -> None:
        """Have the keys and values in memory."""
        self.prefetch(layers)
        for layer in layers:
            for name in names(layer):
                stored = self._stored.get((id(layer), name))
                if stored is None or stored.reading is None:
                    continue
                futures, tokens = stored.reading
                for future in futures:
                    future.result()
                setattr(layer, name, tokens.permute(1, 2, 0, 3).to(layer.device))
                stored.reading = None

    def put(self, layers: Sequence[DynamicLayer]) -> None:
        """Write what is new, and have nothing in memory."""
        for layer in layers:
            if layer.is_initialized and layer.keys is not None:
                for name in names(layer):
                    tensor: Tensor = getattr(layer, name)
                    if tensor.numel() and not tensor.is_meta:
                        self._write(self._stored.setdefault((id(layer), name), _Stored()), layer, name, tensor)
                        setattr(layer, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def settle(self) -> None:
        """Wait for all that is being written, which is in memory until then."""
        while self._writes:
            self._settle(self._writes.popleft())

    def drop(self, layers: Sequence[DynamicLayer]) -> None:
        """Forget these layers: their sequences are finished."""
        for layer in layers:
            for name in names(layer):
                stored = self._stored.pop((id(layer), name), None)
                if stored is not None:
                    self._settle(stored)
                    for future in stored.reading[0] if stored.reading is not None else ():
                        future.result()  # read ahead for nothing: its place may be another's from now on
                    if stored.region is not None:
                        self._regions.give(stored.region)

    def _read(self, stored: _Stored) -> None:
        self._settle(stored)
        assert stored.region is not None
        batch, heads, seq, dim = stored.shape
        raw = room(seq * stored.stride)
        self.bytes_read += len(raw)
        futures = self._reader.fill(self._regions.file, stored.region.offset, torch.uint8, raw, "the cache")
        stored.reading = futures, raw.view(stored.dtype).view(seq, batch, heads, dim)

    def _write(self, stored: _Stored, layer: DynamicLayer, name: str, tensor: Tensor) -> None:
        self._settle(stored)
        same = stored.region is not None and stored.fits(tensor)
        grown = same and only_grows(layer, name)
        first = stored.held if grown and stored.held <= tensor.shape[2] else 0
        stored.shape, stored.dtype, stored.held = tuple(tensor.shape), tensor.dtype, tensor.shape[2]
        if stored.region is None or stored.held * stored.stride > stored.region.size:
            rows = layer.rows(name, self.tokens) if isinstance(layer, CompressedLayer) else self.tokens
            self._make_room(stored, rows)
            first = 0
        new = tensor[:, :, first:].permute(2, 0, 1, 3).contiguous().cpu()
        raw = new.view(-1).view(torch.uint8).numpy().data
        self.bytes_written += len(raw)
        assert stored.region is not None
        at = stored.region.offset + first * stored.stride
        stored.writing = self._reader.pool.submit(write_all, self._regions.file.fd, at, raw)
        self._writes.append(stored)
        while len(self._writes) > WRITES:
            self._settle(self._writes.popleft())

    def _make_room(self, stored: _Stored, rows: int) -> None:
        """Room for as many tokens as there can be: a disk that is too small is noticed at the first one."""
        if stored.region is not None:
            self._regions.give(stored.region)
            stored.region = None
        stored.region = self._regions.take(max(rows, stored.held) * stored.stride)

    def _settle(self, stored: _Stored) -> None:
        """Wait for what is being written.  Raises ResourceError if it could not be."""
        writing, stored.writing = stored.writing, None
        if writing is not None:
            try:
                writing.result()
            except OSError as error:
                raise self.scratch.refused(error, stored.held * stored.stride) from error

    def close(self) -> None:
        """Free the file; threads that still use it are waited for."""
        self._reader.close()
        self._stored.clear()
        self._regions.close()

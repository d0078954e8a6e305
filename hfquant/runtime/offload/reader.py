"""Reading past the page cache, into memory that lies in one piece, and from there to where it is needed.

A disk takes a request as a list of pieces of memory, a short one.  Ordinary memory is scattered by the page, so a
large read falls apart into small requests, and a disk that serves so many of them a second gives a fraction of its
bandwidth.  Into a buffer of huge pages it stays whole; nothing is copied by the system, and no file that others use is
pushed out of the page cache.  Copying on from the buffer, in the same thread, also aligns what lies anywhere in a file,
and converts it to the type that is computed with.

Where a file system cannot do this, it is read as usual.
"""

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SourceError
from ...memory import HUGE, anonymous
from .clock import undisturbed

BLOCK = 4096  # what offsets, sizes and addresses must be multiples of
BUFFER = 4 << 20  # bytes of the buffer of a thread
CHUNK = BUFFER - 2 * BLOCK  # bytes of a request, wherever they begin


@dataclass(frozen=True)
class Handle:
    """An open file.  direct: the same one past the page cache, -1 where that cannot be had."""

    fd: int
    direct: int = -1

    @staticmethod
    def of(fd: int, path: Path | None = None) -> "Handle":
        """For an open file; without a path, one that has no name."""
        return Handle(fd, _direct(path if path is not None else Path(f"/proc/self/fd/{fd}")))

    def close(self) -> None:
        os.close(self.fd)
        if self.direct >= 0:
            os.close(self.direct)


def _direct(path: Path) -> int:
    """A descriptor for direct reads, -1 if the file system has none."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return -1
    try:
        fd = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return -1
    try:
        os.preadv(fd, [anonymous(BLOCK)], 0)
    except OSError:
        os.close(fd)
        return -1
    return fd


class Reader:
    """Threads that read, each with a buffer of its own."""

    def __init__(self, threads: int, name: str = "hfquant-read") -> None:
        self.threads = max(1, threads)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix=name)
        # all now: Python waits for ever for a thread that finds no memory to begin with
        begun = threading.Barrier(self.threads)
        for started in [self.pool.submit(begun.wait) for _ in range(self.threads)]:
            started.result()
        self._local = threading.local()
        self.spent: list[tuple[float, float]] | None = None  # if set: seconds, and of a processor, of every request

    def fill(self, handle: Handle, offset: int, stored: torch.dtype, target: Tensor, name: str) -> "list[Future[Any]]":
        """Begin to read as many values as `target` [n] has, stored as `stored`; done when all futures are.

        They raise SourceError if the file ends early or cannot be read.
        """
        per = CHUNK // stored.itemsize
        return [
            self.pool.submit(self._read, handle, offset + at * stored.itemsize, stored, target[at : at + per], name)
            for at in range(0, len(target), per)
        ]

    def _read(self, handle: Handle, offset: int, stored: torch.dtype, target: Tensor, name: str) -> None:
        if (spent := self.spent) is None:
            self._fetch(handle, offset, stored, target, name)
            return
        start, used = undisturbed(), time.thread_time()
        self._fetch(handle, offset, stored, target, name)
        spent.append((undisturbed() - start, time.thread_time() - used))

    def _fetch(self, handle: Handle, offset: int, stored: torch.dtype, target: Tensor, name: str) -> None:
        nbytes = target.numel() * stored.itemsize
        if handle.direct < 0 and stored == target.dtype:
            read_into(handle.fd, offset, target.view(torch.uint8).numpy().data, name)
            return
        buffer = self._buffer()
        first = offset // BLOCK * BLOCK if handle.direct >= 0 else offset
        raw = buffer[offset - first : offset - first + nbytes]
        if handle.direct >= 0:
            _read_blocks(handle.direct, first, offset - first + nbytes, buffer.numpy().data, name)
        else:
            read_into(handle.fd, offset, raw.numpy().data, name)
        if raw.data_ptr() % stored.itemsize:
            raw = raw.clone()
        target.copy_(raw.view(stored))

    def _buffer(self) -> Tensor:
        """uint8 [BUFFER] of this thread, in huge pages where the system has them."""
        found: Tensor | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = _in_one_piece(BUFFER)
        return found

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _in_one_piece(nbytes: int) -> Tensor:
    """uint8 [nbytes] at a multiple of a huge page"""
    raw = torch.frombuffer(anonymous(nbytes + HUGE), dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE
    return raw[start : start + nbytes]


def _read_blocks(fd: int, first: int, needed: int, view: memoryview, name: str) -> None:
    """Read whole blocks from `first` on until `needed` bytes are there."""
    done, end = 0, -(-needed // BLOCK) * BLOCK
    while done < needed:
        try:
            got = os.preadv(fd, [view[done:end]], first + done)
        except OSError as error:
            raise SourceError(f"{name} cannot be read: {error}", "check the disk") from error
        done += got
        if done < needed and (not got or got % BLOCK):
            raise _ended(name)


def read_into(fd: int, offset: int, view: memoryview, name: str) -> None:
    """Fill `view` from the file; other threads run meanwhile.  Raises SourceError if the file ends early."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise SourceError(f"{name} cannot be read: {error}", "check the disk") from error
        if not got:
            raise _ended(name)
        done += got


def _ended(name: str) -> SourceError:
    return SourceError(f"the file of {name} ended early", "it was truncated while it was in use: restore it")

"""Giving freed memory back to the system, so that what a process holds follows what it uses."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

MMAP_THRESHOLD = -3  # glibc's number for the option of mallopt


@cache
def _libc() -> Any:
    """glibc, None where the C library is another."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None


def map_large_pieces(size: int) -> None:
    """Let every tensor of at least `size` bytes go back to the system as soon as it is freed, from now on.

    By default glibc raises the size from which it does so to that of whatever was freed last, up to 32 MB, and large
    tensors then leave holes in a heap that grows with every block, by gigabytes of address space in a deep model.  The
    smaller the size, the more the system has to do.  Nothing happens where the C library is not glibc.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(MMAP_THRESHOLD, size)


@contextmanager
def settled() -> Iterator[None]:
    """Give back what is free, and leave what exists now out of garbage collections.

    A collection goes through every object, and there are a million of libraries: after every block that would be a
    twentieth of the time of a small model.
    """
    give_back()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back() -> None:
    """Return the free pages of the heap.  Tensors of many sizes come and go with every block, and malloc keeps them."""
    gc.collect()
    trim()


def trim() -> None:
    """The same without a search for garbage: milliseconds, where work of one kind ends and that of another begins."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)

"""Giving freed memory back to the system, so that what a process holds follows what it uses."""

import ctypes
import gc
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's malloc_trim, None where the C library is another."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return the free pages of the heap.  Tensors of many sizes come and go with every block, and malloc keeps them."""
    gc.collect()
    if (trim := _trim()) is not None:
        trim(0)

"""Memory for tiles and for scratch in large pages, where the system gives them on request.

A weight that is read once for every token is limited by how fast memory is read, and that by the walk through small
pages.
"""

import ctypes
import math
import sys
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

PAGE = 1 << 21
SHARED = 4 * PAGE  # smaller weights share so much, which is freed with the last of them
LINE = 64
ADVICE = 14  # MADV_HUGEPAGE
KEPT = 1 << 26  # bytes of scratch memory that a thread keeps
_LOCK = threading.Lock()
_LOCAL = threading.local()


class _Last:
    """The shared memory that still has room."""

    memory: Tensor | None = None
    used = SHARED


def room(shape: Sequence[int]) -> Tensor:
    """uint8, not initialised, aligned to lines of the cache."""
    size = math.prod(shape)
    if size >= SHARED // 2:
        return _pages(size).view(*shape)
    step = -(-size // LINE) * LINE
    with _LOCK:
        if _Last.memory is None or _Last.used + step > SHARED:
            _Last.memory, _Last.used = _pages(SHARED), 0
        start, _Last.used = _Last.used, _Last.used + step
        return _Last.memory[start : start + size].view(*shape)


def scratch(size: int) -> int:
    """Address of so many bytes that are this thread's until its next call."""
    held: int = getattr(_LOCAL, "size", 0)
    if held < size or held > KEPT >= size:
        _LOCAL.memory = _pages(size)
        _LOCAL.size, _LOCAL.at = size, _LOCAL.memory.data_ptr()
    return int(_LOCAL.at)


def _pages(size: int) -> Tensor:
    """Aligned to a large page, and in large pages but for the rest at the end."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8, device="cpu")
    first = -memory.data_ptr() % PAGE
    found = memory[first : first + size]
    advise = _advise()
    if advise is not None:
        advise(found.data_ptr(), size // PAGE * PAGE, ADVICE)  # where it is not followed, small pages do as well
    return found


@cache
def _advise() -> Any:
    """Linux' madvise, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function

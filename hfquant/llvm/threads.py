"""The threads that torch has already: OpenMP's own entry points, called as compiled code would.

A second pool of threads would spin against torch's.  Where torch's OpenMP is not found, one thread does the work.
"""

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Pool(NamedTuple):
    """OpenMP as torch has loaded it."""

    parallel: Any  # GOMP_parallel(function, data, threads, flags)
    thread: int  # addresses of functions
    threads: int
    barrier: int


@cache
def pool() -> Pool | None:
    """None where the process has no OpenMP with these functions (GNU's and LLVM's have them)."""
    for path in _libraries():
        library = ctypes.CDLL(path)
        try:
            parallel = library.GOMP_parallel
            addresses = [
                ctypes.cast(function, ctypes.c_void_p).value or 0
                for function in (library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier)
            ]
        except AttributeError:
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return Pool(parallel, *addresses)
    return None


def _libraries() -> list[str]:
    """The OpenMP libraries that this process has loaded, torch's first."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    found = {line.split()[-1] for line in maps.read_text().splitlines() if re.search(r"lib(gomp|iomp5|omp)[-.]", line)}
    return sorted(found, key=lambda path: (str(Path(torch.__file__).parent.parent) not in path, path))

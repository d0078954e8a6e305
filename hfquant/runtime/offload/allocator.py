"""Large tensors in mappings of their own, so that memory in use is memory taken.

glibc raises the size from which it maps memory to whatever was last freed, up to 32 MB.  Below it, tensors that live
long (the cache) and short (activations) share a heap, whose holes cost up to a third of a model's cache.  A fixed size
costs nothing that could be measured, and makes the peak what the cost model says.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


def steady() -> bool:
    """Fix the size from which memory is mapped, for the whole process.  False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE) == 1

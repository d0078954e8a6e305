"""Memory straight from the system, and giving it back, so that what a process holds follows what it uses."""

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

MMAP_THRESHOLD = -3  # glibc's number for the option of mallopt
HUGE = 2 << 20  # bytes of a huge page


def anonymous(nbytes: int) -> mmap.mmap:
    """Zeros in pages of this process alone, which the system clears as they are first touched; freed with the object.

    In huge pages where the system has them and one fits wherever the memory begins.  Private, not shared as Python has
    it by default: shared pages count as files in memory, no limit on data holds for them, a forked child writes into
    its parent's, and touching them first takes longer.  Raises OSError where there is no memory left.
    """
    if sys.platform == "win32":  # where nothing is shared that has no name
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= 2 * HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def huge_pages() -> None:
    """Ask for huge pages for torch's large tensors, in this process and those it begins, before its first tensor.

    Tensors of more than 2 MB come fresh from the system, cleared, in pages of 4 kB that are faulted in one by one: a
    fifth of the time in which a small model is compressed.  Torch asks for larger ones if it is told to; it looks when
    it makes its first tensor.  They cost no memory: none reaches beyond what was asked for.  Whoever has set
    THP_MEM_ALLOC_ENABLE has their way.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


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
    huge_pages()
    if (libc := _libc()) is not None:
        libc.mallopt(MMAP_THRESHOLD, size)


@contextmanager
def settled() -> Iterator[None]:
    """Give back what is free, and leave what exists now out of garbage collections.

    A collection goes through every object, and there are a million of libraries: after every block that would be a
    twentieth of the time of a small model.  Where somebody left objects out before, those stay out and no more come:
    Python takes all of them back or none.
    """
    give_back()
    if gc.get_freeze_count():
        yield
        return
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


def unmap_libraries() -> None:
    """Take out of this process's memory the pages of libraries that hold what their files hold.

    Most of them were needed once, while modules were imported: of 110 MB that torch and transformers leave, 70 never
    come back, of 175 with triton installed 135.  Those that are needed again come from the system's cache of files, as
    they came first.  Nothing is lost: no mapping with a page that was written to is touched, nor one of a file without
    code, which might be closed meanwhile and its place be taken; no thread may unload libraries meanwhile.  Nothing
    happens where the system is not Linux, its C library is not glibc, or it does not say what is mapped.
    """
    if (libc := _libc()) is None:
        return
    import psutil

    with suppress(OSError, psutil.Error):
        mapped = psutil.Process().memory_maps(grouped=False)
        code = {one.path for one in mapped if "x" in one.perms and os.path.isfile(one.path)}
        for one in mapped:
            if one.path in code and "w" not in one.perms and not one.anonymous and not one.swap:
                begin, end = (int(word, 16) for word in one.addr.split("-"))
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)

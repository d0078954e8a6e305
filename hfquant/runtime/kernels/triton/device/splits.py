"""Sums that several programs share: each adds up some columns, and they meet in memory.

JOIN = "last"      the program that comes last adds them up, in a fixed order: the same bits in every run, one launch
JOIN = "launch"    another launch does, in the same order
JOIN = "atomic"    memory adds them up, in any order; another launch does the rest
"""

import triton
import triton.language as tl

JOINS = ("last", "launch", "atomic")


@triton.jit
def meet(acc, n, m, mask, partial_ptr, count_ptr, tile, share, rows, padded, SPLIT: tl.constexpr, JOIN: tl.constexpr):
    """Leave sums [OUTS, ROWS] in partial [SPLIT, rows, padded]; whether all are there, and this program is to go on."""
    at = partial_ptr + (m[None, :] * padded + n[:, None])
    if JOIN == "atomic":
        tl.atomic_add(at, acc, mask=mask, sem="relaxed")
        return False
    else:
        tl.store(at + share * rows * padded, acc, mask=mask)
        if JOIN == "launch":
            return False
        else:
            tl.debug_barrier()  # every thread has stored before one of them counts
            last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
            tl.store(count_ptr + tile, 0, mask=last)  # for the next launch
            return last


@triton.jit
def summed(partial_ptr, n, m, mask, rows, padded, SPLIT: tl.constexpr):
    """Σ partial sums, in their order.  [OUTS, ROWS]"""
    at = partial_ptr + (m[None, :] * padded + n[:, None])
    # past the first-level cache, which does not know what other programs wrote
    acc = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
    for share in range(1, SPLIT):
        acc += tl.load(at + share * rows * padded, mask=mask, other=0, cache_modifier=".cg")
    return acc


@triton.jit
def store(y_ptr, y, n, m, mask, outs):
    """y [OUTS, ROWS] -> [rows, outs]"""
    tl.store(y_ptr + m[None, :] * outs + n[:, None], y.to(y_ptr.dtype.element_ty), mask=mask & (n[:, None] < outs))

"""Sums over tokens, S += xᵀy in float32: what GPTQ's Hessian is made of.

The same bytes for any number of threads.  xᵀx takes the tiles on and below the diagonal only: half the work.
"""

from array import array
from dataclasses import replace
from functools import cache, lru_cache

import llvmlite.binding as llvm
import torch
from torch import Tensor

from ...llvm import engine
from ...llvm.machine import Level, level
from ...llvm.threads import pool
from .layout import address
from .memory import scratch
from .sums import LINE, WIDTH, Sum, generate

DEPTH = 1024  # of what is packed and summed at a time
PACKED = 1 << 25  # bytes of it
NEAR = 1 << 20  # bytes of y's panels over which x's pass: about what a core's second cache holds
WORTH = 1 << 22  # multiplications that are worth a second thread
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def add(S: Tensor, x: Tensor, y: Tensor | None = None, at: Level | None = None) -> None:
    """S += xᵀy; without y S += xᵀx, on and below the diagonal, what is above being left undefined.

    S float32 [n, m]; x [tokens, n] and y [tokens, m] of one type, float32, bfloat16 or float16.  at: the instructions
    to use, by default this machine's.
    """
    at, other = at or best(), x if y is None else y
    columns = x.shape[1] + (0 if y is None else other.shape[1])
    turn = max(1, min(DEPTH, PACKED // (LINE * (columns // WIDTH + 2)))) * (2 if kind_of(at, x.dtype) == "dot" else 1)
    for begin in range(0, x.shape[0], turn):
        part = None if y is None else y[begin : begin + turn].contiguous()
        _add(S, x[begin : begin + turn].contiguous(), part, at)


def _add(S: Tensor, x: Tensor, y: Tensor | None, at: Level) -> None:
    tokens, columns, beside = x.shape[0], *S.shape
    kind = kind_of(at, x.dtype)
    depth = -(-tokens // 2) if kind == "dot" else tokens
    panels, across = -(-columns // WIDTH), -(-beside // WIDTH)
    packed = scratch((panels + (0 if y is None else across)) * depth * LINE)
    items = _items(panels, across, y is None, max(1, NEAR // (LINE * max(1, depth))))
    record = array("q", [0] * len(Sum))
    record[Sum.X], record[Sum.Y], record[Sum.TOKENS] = x.data_ptr(), 0 if y is None else y.data_ptr(), tokens
    record[Sum.COLUMNS_X], record[Sum.COLUMNS_Y], record[Sum.DEPTH] = columns, beside, depth
    record[Sum.PACKED_X], record[Sum.PACKED_Y] = packed, packed + (0 if y is None else panels * depth * LINE)
    record[Sum.SUM], record[Sum.ITEMS], record[Sum.COUNT] = S.data_ptr(), address(items), len(items) // 3
    _run(function(at, kind), record, threads=tokens * columns * beside // WORTH)


def _run(function: int, record: "array[int]", threads: int) -> None:
    openmp, threads = pool(), min(torch.get_num_threads(), threads)
    if openmp is None or threads < 2:
        engine.call(function, record)
        return
    record[Sum.THREADS], record[Sum.BARRIER] = threads, openmp.barrier
    openmp.parallel(function, record.buffer_info()[0], threads, 0)


@lru_cache(maxsize=64)
def _items(panels: int, across: int, symmetric: bool, near: int) -> "array[int]":
    """Panels of x, each with a few of y, these few staying the same for as long as can be.  See `Sum.ITEMS`."""
    items = array("q")
    for first in range(0, across, near):
        for i in range(first if symmetric else 0, panels):
            items.extend((i, first, min(first + near, i + 1 if symmetric else across)))
    return items


@cache
def best() -> Level:
    """This machine's instructions, products of bfloat16 among them where it has those.

    Raises ImportError without llvmlite, OSError if the processor has nothing that is known here.
    """
    found = level()
    if found is None:
        raise OSError("this processor has no AVX2")
    if found.vector == 64 and llvm.get_host_cpu_features().get("avx512bf16"):
        return replace(found, name="avx512bf16", features=f"{found.features},+avx512bf16")
    return found


def kind_of(at: Level, dtype: torch.dtype) -> str:
    """How x is packed: `dot`, or what it is unpacked from."""
    name = str(dtype).removeprefix("torch.")
    return "dot" if name == "bfloat16" and "avx512bf16" in at.features else name


def prepare(dtype: torch.dtype) -> None:
    """Make the code for such inputs.  RuntimeError or OSError if that fails."""
    function(best(), kind_of(best(), dtype))


def function(at: Level, kind: str) -> int:
    """Address of the code."""
    return engine.function(at, f"gram {kind}", "gram", lambda code: generate(code, kind))

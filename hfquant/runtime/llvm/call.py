"""x times weights in tiles."""

import ctypes
import threading
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import engine
from .layout import Tiled, address
from .records import KINDS, Call, Inputs, Job
from .threads import pool

BAND = 1 << 18  # bytes of prepared x that the tiles pass over again and again: it stays in a core's second cache
SHARE = 1 << 16  # bytes of weights and rows of x that are worth a thread
KEPT = 1 << 26  # bytes of scratch memory that a thread keeps
_LOCAL = threading.local()


def multiply(
    x: Tensor,
    weights: Sequence[Tiled],
    biases: Sequence[Tensor | None],
    inner: Sequence[Tensor | None],
    static: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """[rows, out] in x's dtype for each of the weights, whose preparations are equal.

    x contiguous [rows, in] float32, bfloat16 or float16; biases of the same types; inner (x Vᵀ)·s float32 [rows, r] of
    those that have a low rank.  static: scale and zero point of x, float32 [1], instead of the weights' own.
    """
    first, rows = weights[0], x.shape[0]
    ys = [x.new_empty(rows, weight.out_features) for weight in weights]
    jobs = array("q")
    for weight, y, bias, t in zip(weights, ys, biases, inner, strict=True):
        kind = 0 if bias is None else KINDS[bias.dtype]
        pointer = 0 if bias is None else bias.data_ptr()
        jobs.extend((address(weight.record), y.data_ptr(), pointer, kind, 0 if t is None else t.data_ptr()))
    inputs = first.inputs
    if static is not None:
        inputs = array("q", inputs)
        inputs[Inputs.STATIC], inputs[Inputs.STATIC_ZERO] = static[0].data_ptr(), static[1].data_ptr()
    tiles, threads = sum(weight.tiles for weight in weights), _threads(rows, weights)
    record = array("q", _ZEROS)
    record[Call.X], record[Call.KIND], record[Call.COUNT] = x.data_ptr(), KINDS[x.dtype], rows
    record[Call.INPUTS] = address(inputs)
    _lay_out(record, first, rows, threads)
    record[Call.JOBS], record[Call.JOBS_COUNT], record[Call.TILES] = address(jobs), len(weights), tiles
    record[Call.STEP] = max(1, tiles // (4 * threads))
    width = first.preparation.runs.padded * (4 if first.tile.real else 1)
    record[Call.BAND] = max(8, BAND // width // 8 * 8)
    if threads == 1:
        _function(first.work)(address(record))
        return ys
    openmp = pool()
    assert openmp is not None
    record[Call.THREAD], record[Call.THREADS], record[Call.BARRIER] = openmp.thread, openmp.threads, openmp.barrier
    openmp.parallel(first.work, address(record), threads, 0)
    return ys


_ZEROS = array("q", [0] * len(Call))


@cache
def _function(address: int) -> "ctypes._CFunctionType":
    return engine.FUNCTION(address)


def _threads(rows: int, weights: Sequence[Tiled]) -> int:
    wanted = torch.get_num_threads()
    if wanted == 1 or pool() is None:
        return 1
    work = rows * sum(weight.tiles * weight.preparation.runs.padded * weight.tile.bits * 2 for weight in weights)
    return max(1, min(wanted, work // SHARE))


def _lay_out(record: "array[int]", weight: Tiled, rows: int, threads: int) -> None:
    """Room for what x becomes."""
    runs = weight.preparation.runs
    size = rows * len(runs.spans) * 4
    sizes = {Call.PREPARED: rows * runs.padded * (4 if weight.tile.real else 1), Call.SCALES: size, Call.NEGATIVE: size}
    if weight.tile.sums:
        sizes[Call.SHIFTS] = size
    if not weight.tile.real:
        sizes[Call.SCRATCH] = threads * runs.padded * 4
    at = _scratch(sum(-(-size // 64) * 64 for size in sizes.values()))
    for place, size in sizes.items():
        record[place] = at
        at += -(-size // 64) * 64


def _scratch(size: int) -> int:
    """Address of so many bytes that are this thread's until its next call."""
    held: Tensor | None = getattr(_LOCAL, "held", None)
    if held is None or held.numel() < size or held.numel() > max(size, KEPT):
        held = _LOCAL.held = torch.empty(size, dtype=torch.uint8)
    return held.data_ptr()

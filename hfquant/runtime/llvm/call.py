"""x times weights in tiles."""

import threading
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import engine
from .layout import Tiled, address
from .records import KINDS, Call, Inputs, Job
from .threads import pool

BAND = 1 << 18  # bytes of prepared x that the tiles pass over again and again: it stays in a core's second cache
SHARE = 1 << 16  # bytes of weights and rows of x that are worth a thread
KEPT = 1 << 26  # bytes of scratch memory that a thread keeps
CPU = torch.device("cpu")
_LOCAL = threading.local()


class Plan:
    """Everything about a call but its addresses."""

    def __init__(self, weights: Sequence[Tiled], rows: int, dtype: torch.dtype, threads: int) -> None:
        first = weights[0]
        runs, width = first.how.runs, 4 if first.tile.real else 1
        self.rows, self.work, self.threads = rows, first.work, threads
        self.outs = [weight.out_features for weight in weights]
        record = array("q", [0] * (len(Call) + len(Job) * len(weights)))
        record[Call.KIND], record[Call.COUNT], record[Call.INPUTS] = KINDS[dtype], rows, address(first.inputs)
        record[Call.TILES] = tiles = sum(weight.tiles for weight in weights)
        record[Call.STEP] = max(1, tiles // (4 * threads))
        record[Call.BAND] = max(8, BAND // (runs.padded * width) // 8 * 8)
        if threads > 1 and (openmp := pool()) is not None:
            self.parallel: Any = openmp.parallel
            record[Call.THREAD], record[Call.THREADS] = openmp.thread, openmp.threads
            record[Call.BARRIER] = openmp.barrier
        for i, weight in enumerate(weights):
            record[len(Call) + len(Job) * i] = address(weight.record)
        self.record = record
        self.places: list[tuple[int, int]] = []  # of a record, and where in the scratch memory it points to
        self.scratch = 0
        table = rows * len(runs.spans) * 4
        for place, size in (
            (Call.PREPARED, rows * runs.padded * width),
            (Call.SCALES, table),
            (Call.NEGATIVE, table),
            (Call.SHIFTS, table if first.tile.sums else 0),
            (Call.SCRATCH, 0 if first.tile.real else threads * runs.padded * 4),
        ):
            if size:
                self.places.append((int(place), self.scratch))
                self.scratch += -(-size // 64) * 64


def multiply(
    x: Tensor,
    weights: Sequence[Tiled],
    biases: Sequence[Tensor | None],
    inner: Sequence[Tensor | None] = (),
    static: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """[..., out] in x's dtype for each of the weights, whose preparations are equal.

    x contiguous [..., in] float32, bfloat16 or float16; biases of the same types; inner: (x Vᵀ)·s float32 [rows, r] of
    those that have a low rank.  static: scale and zero point of x, float32 [1], instead of the weights' own.
    """
    first = weights[0]
    plan = _plan(weights, x.numel() // first.in_features, x.dtype)
    record, shape = plan.record[:], x.shape[:-1]
    at = address(record)
    record[Call.X], record[Call.JOBS] = x.data_ptr(), at + 8 * len(Call)
    memory = _scratch(plan.scratch)
    for place, offset in plan.places:
        record[place] = memory + offset
    ys, job = [], len(Call)
    for i, out in enumerate(plan.outs):
        y, bias = x.new_empty((*shape, out)), biases[i]
        record[job + Job.Y] = y.data_ptr()
        if bias is not None:
            record[job + Job.BIAS], record[job + Job.BIAS_KIND] = bias.data_ptr(), KINDS[bias.dtype]
        if inner and (t := inner[i]) is not None:
            record[job + Job.INNER] = t.data_ptr()
        ys.append(y)
        job += len(Job)
    if static is not None:
        inputs = array("q", first.inputs)
        inputs[Inputs.STATIC], inputs[Inputs.STATIC_ZERO] = static[0].data_ptr(), static[1].data_ptr()
        record[Call.INPUTS] = address(inputs)
    if plan.threads == 1:
        _function(plan.work)(at)
    else:
        plan.parallel(plan.work, at, plan.threads, 0)
    return ys


def _plan(weights: Sequence[Tiled], rows: int, dtype: torch.dtype) -> Plan:
    """Remembered by the first weight: as many as there are numbers of rows in use."""
    threads = torch.get_num_threads()
    key = (rows, dtype, threads, *[id(weight) for weight in weights[1:]])
    plans = weights[0].plans
    found: Plan | None = plans.get(key)
    if found is None:
        if len(plans) >= PLANS:
            plans.clear()
        found = plans[key] = Plan(weights, rows, dtype, _threads(rows, weights, threads))
    return found


PLANS = 16


@cache
def _function(address: int) -> Any:
    return engine.FUNCTION(address)


def _threads(rows: int, weights: Sequence[Tiled], wanted: int) -> int:
    """How many threads are worth it."""
    if wanted == 1 or pool() is None:
        return 1
    work = rows * sum(weight.tiles * weight.how.runs.padded * weight.tile.bits * 2 for weight in weights)
    return max(1, min(wanted, work // SHARE))


def _scratch(size: int) -> int:
    """Address of so many bytes that are this thread's until its next call."""
    held: Tensor | None = getattr(_LOCAL, "held", None)
    if held is None or not size <= held.numel() <= max(size, KEPT):
        held = torch.empty(size, dtype=torch.uint8, device=CPU)
        _LOCAL.held, _LOCAL.at = held, held.data_ptr()
    return int(_LOCAL.at)

"""x times weights in tiles."""

import math
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
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


# Places in a plan's record, as plain numbers: an enum's take longer to look up than all the rest.
_X, _JOBS, _INPUTS, _JOB = int(Call.X), int(Call.JOBS), int(Call.INPUTS), len(Call)
_Y, _BIAS, _BIAS_KIND, _INNER, _SIZE = int(Job.Y), int(Job.BIAS), int(Job.BIAS_KIND), int(Job.INNER), len(Job)


class Plan:
    """A call for x of one shape and type: everything about it but where its tensors are.

    x contiguous [..., in] float32, bfloat16 or float16; the weights' preparations are equal.
    """

    def __init__(self, weights: Sequence[Tiled], shape: Sequence[int], dtype: torch.dtype) -> None:
        first, rows = weights[0], math.prod(shape[:-1])
        runs, width = first.how.runs, 4 if first.tile.real else 1
        self.weights, self.rows = tuple(weights), rows  # the record points to what they hold
        self.shapes = [(*shape[:-1], weight.out_features) for weight in weights]
        self.wanted = torch.get_num_threads()
        self.threads = _threads(rows, weights, self.wanted)
        record = array("q", [0] * (_JOB + _SIZE * len(weights)))
        record[Call.KIND], record[Call.COUNT], record[Call.INPUTS] = KINDS[dtype], rows, address(first.inputs)
        record[Call.TILES] = tiles = sum(weight.tiles for weight in weights)
        record[Call.STEP] = max(1, tiles // (4 * self.threads))
        record[Call.BAND] = max(8, BAND // (runs.padded * width) // 8 * 8)
        for i, weight in enumerate(weights):
            record[_JOB + _SIZE * i] = address(weight.record)
        self.run = self._runner(record, first.work)
        table = rows * len(runs.spans) * 4
        self.memory = 0  # the scratch memory that the record points into
        self.size, self.places = _laid_out(
            {
                Call.PREPARED: rows * runs.padded * width,
                Call.SCALES: table,
                Call.NEGATIVE: table,
                Call.SHIFTS: table if first.tile.sums else 0,
                Call.SCRATCH: 0 if first.tile.real else self.threads * runs.padded * 4,
            }
        )
        self.record = record

    def _runner(self, record: "array[int]", work: int) -> Callable[[int], None]:
        """What runs a record, given its address."""
        if self.threads == 1:
            return _function(work)
        openmp = pool()
        assert openmp is not None
        record[Call.THREAD], record[Call.THREADS] = openmp.thread, openmp.threads
        record[Call.BARRIER] = openmp.barrier
        return lambda at: openmp.parallel(work, at, self.threads, 0)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the only weight."""
        record = self.prepared(x)
        y = x.new_empty(self.shapes[0])
        record[_JOB + _Y] = y.data_ptr()
        if bias is not None:
            record[_JOB + _BIAS], record[_JOB + _BIAS_KIND] = bias.data_ptr(), KINDS[bias.dtype]
        self.run(record[_JOBS] - 8 * _JOB)
        return y

    def prepared(self, x: Tensor) -> "array[int]":
        """A record of its own for this call."""
        memory = _scratch(self.size)
        if memory != self.memory:  # another thread, or more of it
            record = self.record[:]
            for place, offset in self.places:
                record[place] = memory + offset
            self.record, self.memory = record, memory
        record = self.record[:]
        if record[self.places[0][0]] != memory:  # another thread was faster
            return self.prepared(x)
        record[_X], record[_JOBS] = x.data_ptr(), record.buffer_info()[0] + 8 * _JOB
        return record


def multiply(
    plan: Plan,
    x: Tensor,
    biases: Sequence[Tensor | None],
    inner: Sequence[Tensor | None],
    static: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """[..., out] in x's dtype for each of a plan's weights.

    biases of x's types; inner: (x Vᵀ)·s float32 [rows, r] of weights that have a low rank.  static: scale and zero
    point of x, float32 [1], instead of the weights' own.
    """
    record, job, ys = plan.prepared(x), _JOB, []
    for shape, bias, t in zip(plan.shapes, biases, inner, strict=True):
        y = x.new_empty(shape)
        record[job + _Y] = y.data_ptr()
        if bias is not None:
            record[job + _BIAS], record[job + _BIAS_KIND] = bias.data_ptr(), KINDS[bias.dtype]
        if t is not None:
            record[job + _INNER] = t.data_ptr()
        ys.append(y)
        job += _SIZE
    if static is not None:
        inputs = array("q", plan.weights[0].inputs)
        inputs[Inputs.STATIC], inputs[Inputs.STATIC_ZERO] = static[0].data_ptr(), static[1].data_ptr()
        record[_INPUTS] = address(inputs)
    plan.run(address(record))
    return ys


def _laid_out(sizes: Mapping[Call, int]) -> tuple[int, list[tuple[int, int]]]:
    """Bytes in all, and (place in the record, offset) of everything that has a size."""
    at, places = 0, []
    for place, size in sizes.items():
        if size:
            places.append((int(place), at))
            at += -(-size // 64) * 64
    return at, places


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
    held: int = getattr(_LOCAL, "size", 0)
    if held < size or held > KEPT >= size:
        _LOCAL.memory = torch.empty(size, dtype=torch.uint8, device=CPU)
        _LOCAL.size, _LOCAL.at = size, _LOCAL.memory.data_ptr()
    return int(_LOCAL.at)

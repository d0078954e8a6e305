"""x times weights in tiles."""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...llvm import engine
from ...llvm.threads import pool
from .joining import joined, parts_of
from .layout import Tiled, address
from .memory import scratch
from .records import KINDS, Call, Inputs

BAND = 1 << 18  # bytes of prepared x that the tiles pass over again and again: it stays in a core's second cache
SHARE = 1 << 16  # bytes of weights and rows of x that are worth a thread


# Places in a record, as plain numbers: an enum's take longer to look up than all the rest.
_X, _Y, _BIAS, _BIAS_KIND, _INNER, _INPUTS = map(
    int, (Call.X, Call.Y, Call.BIAS, Call.BIAS_KIND, Call.INNER, Call.INPUTS)
)


class Plan:
    """x times a weight, for x of one shape and type: everything about it but where its tensors are.

    x contiguous [..., in] float32, bfloat16 or float16 -> [..., out] in x's dtype.  A bias has one of these types;
    inner is (x Vᵀ)·s, float32 [rows, r], of a weight with a low rank; static the scale and zero point of x, float32
    [1], in the place of the weight's own.
    """

    def __init__(self, weight: Tiled, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.given = shape, dtype
        rows, runs, width = math.prod(shape[:-1]), weight.how.runs, 4 if weight.tile.real else 1
        self.weight = weight  # the record points to what it holds
        self.shape = (*shape[:-1], weight.out_features)
        self.threads = _threads(rows, weight)
        record = array("q", [0] * len(Call))
        record[Call.KIND], record[Call.COUNT], record[Call.TILES] = KINDS[dtype], rows, weight.tiles
        record[Call.INPUTS], record[Call.WEIGHT] = address(weight.inputs), address(weight.record)
        record[Call.STEP] = max(1, weight.tiles // (4 * self.threads))
        record[Call.BAND] = max(8, BAND // (runs.padded * width) // 8 * 8)
        self.run = self._runner(record, weight.work)
        table = rows * len(runs.spans) * 4
        self.memory = 0  # the scratch memory that the record points into
        self.size, self.places = _laid_out(
            {
                Call.PREPARED: rows * runs.padded * width,
                Call.SCALES: table,
                Call.NEGATIVE: table,
                Call.SHIFTS: table if weight.tile.sums else 0,
                Call.SCRATCH: 0 if weight.tile.real else self.threads * runs.padded * 4,
            }
        )
        self.record = record

    def fits(self, other: "Plan") -> bool:
        """Whether x is prepared alike for both."""
        return (
            self.given == other.given and self.weight.tile == other.weight.tile and self.weight.how == other.weight.how
        )

    def joined(self, others: Sequence["Plan"]) -> "tuple[Plan, list[Plan]] | None":
        """One plan for the rows of several weights [..., out + out + ...], and one for each with its part of that
        memory, of plans that fit; None if the weights cannot be joined."""
        plans = [self, *others]
        whole = joined([plan.weight.held for plan in plans])
        if whole is None:
            return None
        made = Plan(Tiled(whole, self.weight.how), *self.given)
        if self.weight.held.within is whole:
            return made, plans
        own = parts_of(whole, [plan.weight.out_features for plan in plans])
        return made, [Plan(Tiled(held, self.weight.how), *self.given) for held in own]

    def _runner(self, record: "array[int]", work: int) -> Callable[[int], None]:
        """What runs a record, given its address."""
        if self.threads == 1:
            return _function(work)
        openmp = pool()
        assert openmp is not None
        record[Call.THREAD], record[Call.THREADS] = openmp.thread, openmp.threads
        record[Call.BARRIER] = openmp.barrier
        return lambda at: openmp.parallel(work, at, self.threads, 0)

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        inner: Tensor | None = None,
        static: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        record = self._prepared(x)
        y = x.new_empty(self.shape)
        record[_Y] = y.data_ptr()
        if bias is not None:
            record[_BIAS], record[_BIAS_KIND] = bias.data_ptr(), KINDS[bias.dtype]
        if inner is not None:
            record[_INNER] = inner.data_ptr()
        if static is not None:
            inputs = array("q", self.weight.inputs)
            inputs[Inputs.STATIC], inputs[Inputs.STATIC_ZERO] = static[0].data_ptr(), static[1].data_ptr()
            record[_INPUTS] = address(inputs)
        self.run(record.buffer_info()[0])
        return y

    def _prepared(self, x: Tensor) -> "array[int]":
        """A record of its own for this call."""
        memory = scratch(self.size)
        if memory != self.memory:  # another thread, or more of it
            record = self.record[:]
            for place, offset in self.places:
                record[place] = memory + offset
            self.record, self.memory = record, memory
        record = self.record[:]
        if record[self.places[0][0]] != memory:  # another thread was faster
            return self._prepared(x)
        record[_X] = x.data_ptr()
        return record


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


def _threads(rows: int, weight: Tiled) -> int:
    """How many threads are worth it."""
    wanted = torch.get_num_threads()
    if wanted == 1 or pool() is None:
        return 1
    work = rows * weight.tiles * weight.how.runs.padded * weight.tile.bits * 2
    return max(1, min(wanted, work // SHARE))

"""Loops over matrices whose columns are independent: 16 of them at a time, shared out over torch's own threads.

Numbers do not depend on how many threads there are: each column is one lane of one thread.
"""

import warnings
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from llvmlite import ir
from torch import Tensor

from . import BROKEN, engine, machine
from .ir import F32, I32, I64, Code, Type, Value, splat, vector
from .threads import pool

N = 16  # columns of a strip; where registers are narrower, LLVM takes two for each vector
LINE = 4 * N  # bytes of a strip's row of float32


class Shared(IntEnum):
    """Where every record begins."""

    STRIPS = 0
    THREAD = 1  # addresses of OpenMP's functions; 0: one thread
    THREADS = 2


FIRST = len(Shared)  # the first place that is a loop's own


@dataclass(frozen=True)
class Loop:
    """A function that does `body(code, record, strip)` for every strip.  name: says all that its code depends on."""

    name: str
    body: Callable[[Code, Value, Value], None]

    def __call__(self, strips: int, places: Mapping[IntEnum, Tensor | int]) -> bool:
        """Run it on a record of numbers and of tensors' addresses.  False, and a warning, if it cannot be compiled."""
        level = machine.level()
        assert level is not None
        try:
            folder = Path(self.body.__code__.co_filename).parent
            function = engine.function(level, self.name, "loop", self.generate, folder)
        except (RuntimeError, OSError) as error:
            BROKEN.append(f"their code could not be made: {str(error).splitlines()[0]}")
            warnings.warn(f"hfquant: generated loops are not used any more: {BROKEN[0]}", RuntimeWarning, stacklevel=3)
            return False
        record = array("q", [0] * (FIRST + len(places)))
        record[Shared.STRIPS] = strips
        for place, value in places.items():
            record[place] = value.data_ptr() if isinstance(value, Tensor) else value
        threads, openmp = min(torch.get_num_threads(), strips), pool()
        if threads > 1 and openmp is not None:
            record[Shared.THREAD], record[Shared.THREADS] = openmp.thread, openmp.threads
            openmp.parallel(function, record.buffer_info()[0], threads, 0)
        else:
            engine.call(function, record)
        return True

    def generate(self, code: Code) -> None:
        """`loop(record)`, what every thread runs"""
        with code.function("loop", 1) as made:
            (record,) = made.args
            count = code.field(record, Shared.STRIPS)
            thread, threads = code.variable(I64, code.number(0)), code.variable(I64, code.number(1))
            with code.if_then(code.nonzero(code.field(record, Shared.THREADS))):
                code.set(thread, code.sext(code.call_at(code.field(record, Shared.THREAD), returns=I32), I64))
                code.set(threads, code.sext(code.call_at(code.field(record, Shared.THREADS), returns=I32), I64))
            me, all_ = code.get(thread), code.get(threads)
            start, end = (code.sdiv(code.mul(count, code.plus(me, i)), all_) for i in (0, 1))
            with code.loop(end, start) as strip:
                self.body(code, record, strip)


def padded(t: Tensor, value: float = 0.0, width: int = N) -> Tensor:
    """[n, columns] -> [n, whole strips of a width], contiguous: the same tensor where it is so already"""
    rest = -t.shape[1] % width
    return torch.nn.functional.pad(t, (0, rest), value=value) if rest else t.contiguous()


FLOATS: Type = vector(F32, N)


def floats(code: Code, address: Value) -> Value:
    return code.read(FLOATS, address, 4)


def constant(value: float) -> Value:
    return splat(F32, N, value)


def scalar(code: Code, address: Value) -> Value:
    """One float32, in all lanes."""
    return code.spread(code.read(F32, address, 4), N)


def nearest(code: Code, value: Value) -> Value:
    """To the nearest integer, ties to even, as torch rounds."""
    return code.intrinsic(f"llvm.roundeven.v{N}f32", FLOATS, value)


def clamp(code: Code, value: Value, low: Value, high: Value) -> Value:
    """NaN stays NaN."""
    value = code.select(code.fcmp_ordered("<", value, low), low, value)
    return code.select(code.fcmp_ordered(">", value, high), high, value)


def some(code: Code, condition: Value) -> Value:
    """Whether it holds in any lane."""
    return code.nonzero(code.bitcast(condition, ir.IntType(N)))


def repeat(code: Code, end: Value, start: Value, body: Callable[[Value], None], times: int = 4) -> None:
    """body(i) for every start <= i < end, written out `times` times."""
    whole = code.plus(start, (code.sdiv(code.sub(end, start), code.number(times)), times))
    with code.loop(whole, start, times) as i:
        for k in range(times):
            body(code.plus(i, k))
    with code.loop(end, whole) as i:
        body(i)

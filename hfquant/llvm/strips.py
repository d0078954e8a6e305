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


def padded(t: Tensor, value: float = 0.0) -> Tensor:
    """[n, columns] -> [n, whole strips], contiguous: the same tensor where it is so already"""
    rest = -t.shape[1] % N
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


class Tile:
    """As many strips as fit into the registers, multiplied together by rows of a matrix.

    What belongs to a tile is laid out [n, strips, 16]: `tiled`.
    """

    ROWS = 4  # of the matrix, at a time

    def __init__(self, code: Code) -> None:
        self.code, self.strips = code, range(strips_of(code.level))
        self.line = LINE * len(self.strips)

    def sums(self, count: int) -> list[list[Value]]:
        """Rooms for products by `count` rows, zero."""
        found = [[self.code.variable(FLOATS) for _ in self.strips] for _ in range(count)]
        for rooms in found:
            for room in rooms:
                self.code.set(room, constant(0.0))
        return found

    def add(self, sums: list[list[Value]], rows: list[Value], V: Value, left: Value, right: Value) -> None:
        """sums_i += Σ row_ij·V_j over left <= j < right.  rows, V: addresses"""
        code = self.code
        with code.loop(right, left) as j:
            values = [self.read(V, j, s) for s in self.strips]
            for rooms, row in zip(sums, rows, strict=True):
                by = scalar(code, code.plus(row, (j, 4)))
                for room, value in zip(rooms, values, strict=True):
                    code.set(room, code.fma(by, value, code.get(room)))

    def place(self, V: Value, j: Value, strip: int) -> Value:
        return self.code.plus(V, (j, self.line), LINE * strip)

    def read(self, V: Value, j: Value, strip: int) -> Value:
        return floats(self.code, self.place(V, j, strip))

    def write(self, value: Value, V: Value, j: Value, strip: int) -> None:
        self.code.write(value, self.place(V, j, strip), 4)

    def few(self, start: Value, end: Value, body: Callable[[Value, int], None]) -> None:
        """body(k, count) for `ROWS` of start <= k < end at a time, and for each that is left."""
        code = self.code
        whole = code.plus(start, (code.sdiv(code.sub(end, start), code.number(self.ROWS)), self.ROWS))
        for count, first, last in ((self.ROWS, start, whole), (1, whole, end)):
            with code.loop(last, first, count) as k:
                body(k, count)


def strips_of(level: machine.Level) -> int:
    return 4 if level.vector == LINE else 1


def tiled(t: Tensor, value: float = 0.0) -> Tensor:
    """[n, columns] -> [tiles, n, columns of a tile], for this machine; padded with a value"""
    level = machine.level()
    assert level is not None
    width = N * strips_of(level)
    t = torch.nn.functional.pad(t, (0, -t.shape[1] % width), value=value)
    return t.unflatten(1, (-1, width)).transpose(0, 1).contiguous()


def untiled(t: Tensor, columns: int) -> Tensor:
    """[tiles, n, columns of a tile] -> [n, columns]"""
    return t.transpose(0, 1).flatten(1)[:, :columns].contiguous()

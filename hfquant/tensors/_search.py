"""The search for every group's range, `Grid.fit`, in generated code: all ranges are tried while the group is at hand.

16 rows of the weight are the lanes of a vector.  The arithmetic is that of `Grid._range` and `storable`; only the
order in which a group's squared errors are added is another.  They are all positive: a range whose error is too large
after some columns is left.
"""

from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from ..llvm.ir import F32, I32, Code, Value, splat, vector
from ..llvm.numbers import typed, widened
from ..llvm.strips import FIRST, FLOATS, LINE, Loop, N, clamp, constant, floats, nearest, padded, repeat, scalar, some
from .grid import least

LOOK = 16  # columns after which a range may be left
INFINITY = float("inf")


class Search(IntEnum):
    """What the loop is told."""

    W = FIRST  # float32 [strips, in, 16]
    IMPORTANCE = FIRST + 1  # float32 [in]
    IN = FIRST + 2
    COLUMNS = FIRST + 3  # of a group; divides IN
    TOP = FIRST + 4
    MIDDLE = FIRST + 5
    SHRINKS = FIRST + 6  # float32 [COUNT]
    COUNT = FIRST + 7
    SCALES = FIRST + 8  # float32 [strips, groups, 16]
    ZEROS = FIRST + 9


def search(
    w: Tensor, importance: Tensor, shrinks: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Scales and zero points, float32 [rows, groups].

    w float32 [rows, groups, columns]; importance float32 [groups, columns]; shrinks float32, the parts of a range that
    are tried.  The scales are numbers of `dtype`.  None if the code could not be made.
    """
    rows, groups, columns = w.shape
    strips = -(-rows // N)
    W = padded(w.reshape(rows, -1).T).view(-1, strips, N).transpose(0, 1).contiguous()
    importance, shrinks = importance.contiguous(), shrinks.contiguous()
    scale, zero = (torch.empty(strips, groups, N, dtype=torch.float32, device="cpu") for _ in range(2))
    record: dict[IntEnum, Tensor | int] = {
        Search.W: W, Search.IMPORTANCE: importance, Search.IN: groups * columns, Search.COLUMNS: columns,
        Search.TOP: 2**bits - 1, Search.MIDDLE: 2 ** (bits - 1), Search.SHRINKS: shrinks, Search.COUNT: len(shrinks),
        Search.SCALES: scale, Search.ZEROS: zero,
    }  # fmt: skip
    if not loop(symmetric, dtype)(strips, record):
        return None
    found = (t.transpose(1, 2).reshape(strips * N, groups)[:rows] for t in (scale, zero))
    return next(found), next(found)


@cache
def loop(symmetric: bool, dtype: torch.dtype) -> Loop:
    def body(code: Code, record: Value, strip: Value) -> None:
        _search(code, record, strip, symmetric, dtype)

    return Loop(f"search {symmetric} {dtype}", body)


def _search(code: Code, record: Value, strip: Value, symmetric: bool, dtype: torch.dtype) -> None:
    in_features, columns, count = (code.field(record, p) for p in (Search.IN, Search.COLUMNS, Search.COUNT))
    top, middle = (code.spread(code.sitofp(code.field(record, p), F32), N) for p in (Search.TOP, Search.MIDDLE))
    groups = code.sdiv(in_features, columns)
    with code.loop(groups) as g:
        first = code.mul(g, columns)
        w = code.plus(code.field(record, Search.W), (code.plus(first, (strip, in_features)), LINE))
        h = code.plus(code.field(record, Search.IMPORTANCE), (first, 4))
        low, high = _extremes(code, w, columns)
        best, scale, zero = (code.variable(FLOATS, constant(v)) for v in (INFINITY, 1.0, 0.0))
        with code.loop(count) as i:
            shrink = scalar(code, code.plus(code.field(record, Search.SHRINKS), (i, 4)))
            a, b = code.fmul(low, shrink), code.fmul(high, shrink)
            if symmetric:
                larger = code.select(code.fcmp_ordered(">", b, code.fneg(a)), b, a)
                s, z = _storable(code, code.fdiv(code.fneg(larger), middle), dtype), middle
            else:
                s = _storable(code, code.fdiv(code.fsub(b, a), top), dtype)
                z = clamp(code, nearest(code, code.fdiv(code.fneg(a), s)), constant(0.0), top)
            error = _error(code, w, h, columns, s, z, top, code.get(best))
            better = code.fcmp_ordered("<", error, code.get(best))
            for room, value in ((best, error), (scale, s), (zero, z)):
                code.set(room, code.select(better, value, code.get(room)))
        place = code.mul(code.plus(g, (strip, groups)), code.number(LINE))
        code.write(code.get(scale), code.plus(code.field(record, Search.SCALES), place), 4)
        code.write(code.get(zero), code.plus(code.field(record, Search.ZEROS), place), 4)


def _extremes(code: Code, w: Value, columns: Value) -> tuple[Value, Value]:
    """Zero is always within."""
    low, high = (code.variable(FLOATS, constant(0.0)) for _ in range(2))

    def look(k: Value) -> None:
        value = floats(code, code.plus(w, (k, LINE)))
        code.set(low, code.select(code.fcmp_ordered("<", value, code.get(low)), value, code.get(low)))
        code.set(high, code.select(code.fcmp_ordered(">", value, code.get(high)), value, code.get(high)))

    repeat(code, columns, code.number(0), look)
    return code.get(low), code.get(high)


def _error(code: Code, w: Value, h: Value, columns: Value, s: Value, z: Value, top: Value, best: Value) -> Value:
    """Σ h·(s·(c − z) − w)², or a part of it that is not below the best in any lane."""
    total = code.variable(FLOATS, constant(0.0))

    def add(k: Value) -> None:
        value = floats(code, code.plus(w, (k, LINE)))
        c = clamp(code, nearest(code, code.fadd(code.fdiv(value, s), z)), constant(0.0), top)
        lost = code.fsub(code.fmul(code.fsub(c, z), s), value)
        lost = code.fmul(code.fmul(lost, lost), scalar(code, code.plus(h, (k, 4))))
        code.set(total, code.fadd(code.get(total), lost))

    with (
        code.loop(columns, step=LOOK) as start,
        code.if_then(some(code, code.fcmp_ordered("<", code.get(total), best))),
    ):
        repeat(code, code.least(code.plus(start, LOOK), columns), start, add)
    return code.get(total)


def _storable(code: Code, scale: Value, dtype: torch.dtype) -> Value:
    """As `grid.storable`."""
    largest = torch.finfo(dtype).max
    scale = clamp(code, scale, constant(-largest), constant(largest))
    kind = str(dtype).removeprefix("torch.")
    rounded = widened(code, typed(code, scale, kind), kind)
    bits = vector(I32, N)
    magnitude = code.and_(code.bitcast(rounded, bits), splat(I32, N, 0x7FFFFFFF))
    sign = code.and_(code.bitcast(scale, bits), splat(I32, N, -0x80000000))
    smallest = code.bitcast(code.or_(code.bitcast(constant(least(dtype)), bits), sign), FLOATS)
    small = code.fcmp_ordered("<", code.bitcast(magnitude, FLOATS), constant(least(dtype)))
    return code.select(small, smallest, rounded)

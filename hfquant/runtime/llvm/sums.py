"""The code behind `gram`: S += xᵀy in float32, a tile of 48 x 48 sums at a time.

x and y are packed into panels of 48 columns, [panel, depth, 48], over which all tiles pass again and again.  Where the
processor multiplies bfloat16 (`dot`), a depth is two tokens side by side, products are exact and sums float32; else it
is one token in float32.  Threads take depths to pack, wait for each other, and take items: one panel of x and some of
y, which stay in a core's second cache while x's go by.  A tile is computed by one thread over all depths in one order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial

from llvmlite import ir

from ...llvm import numbers
from ...llvm.ir import F32, I16, I32, I64, POINTER, VOID, Code, Value, splat, vector

WIDTH = 48  # columns of a panel
LINE = 4 * WIDTH  # bytes of a depth
CHUNK = 128  # depths that are multiplied while both panels stay in the first cache
TOGETHER = 8  # depths that are packed together
LANES = 16  # columns that are packed together


class Sum(IntEnum):
    """What `gram` is told."""

    X = 0  # [tokens, columns], contiguous
    Y = 1  # 0 for xᵀx, of which tiles on and below the diagonal are computed
    TOKENS = 2
    COLUMNS_X = 3
    COLUMNS_Y = 4
    PACKED_X = 5  # [panels, depth, 48] of 4 bytes each
    PACKED_Y = 6  # the same as PACKED_X for xᵀx
    DEPTH = 7
    SUM = 8  # float32 [columns of x, columns of y]
    ITEMS = 9  # int64 [count, 3]: a panel of x, the first of y, and the one behind the last
    COUNT = 10
    NEXT = 11  # the next item to take; starts at 0
    NEXT_DEPTH = 12  # the next depth to pack; starts at 0
    THREADS = 13  # whether there are several
    BARRIER = 14  # address of OpenMP's function


class _BFloat(ir.HalfType):  # type: ignore[misc]  # llvmlite has no annotations, and no such type
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()


def generate(code: Code, kind: str) -> None:
    """`gram(record)`, what every thread runs.  kind: how x is packed, `dot` or the type from which it is unpacked"""
    _packing(code, kind)
    _tile(code, kind)
    with code.function("gram", 1) as made:
        (record,) = made.args
        other = code.nonzero(code.field(record, Sum.Y))
        with _taken(code, record, Sum.NEXT_DEPTH, TOGETHER, code.field(record, Sum.DEPTH)) as depth:
            pack = code.module.globals["pack"]
            places = [(Sum.X, Sum.PACKED_X, Sum.COLUMNS_X), (Sum.Y, Sum.PACKED_Y, Sum.COLUMNS_Y)]
            of_x, of_y = ([code.field(record, place) for place in side] for side in places)
            code.call(pack, [record, depth, *of_x])
            with code.if_then(other):
                code.call(pack, [record, depth, *of_y])
        with code.if_then(code.nonzero(code.field(record, Sum.THREADS))):
            code.call_at(code.field(record, Sum.BARRIER))
        with _taken(code, record, Sum.NEXT, 1, code.field(record, Sum.COUNT)) as item:
            at = code.plus(code.field(record, Sum.ITEMS), (item, 24))
            i, first, behind = (code.read(I64, code.plus(at, 8 * k), 8) for k in range(3))
            with code.loop(behind, first) as j:
                code.call(code.module.globals["tile"], [record, i, j])


@contextmanager
def _taken(code: Code, record: Value, place: Sum, step: int, count: Value) -> Iterator[Value]:
    """Within: the body for what no other thread takes."""
    counter = code.inttoptr(code.plus(record, 8 * place), POINTER)
    head, body, after = (code.append_basic_block(name) for name in ("take", "taken", "done"))
    code.branch(head)
    code.position_at_end(head)
    item = code.atomic_rmw("add", counter, code.number(step), "monotonic")
    code.cbranch(code.icmp_signed("<", item, count), body, after)
    code.position_at_end(body)
    yield item
    code.branch(head)
    code.position_at_end(after)


def _packing(code: Code, kind: str) -> None:
    """`pack(record, begin, x, packed, columns)`: some depths of all panels.

    Columns are filled up with zeros to whole vectors, beyond which tiles do not look.
    """
    size = 4 if kind == "float32" else 2
    with code.function("pack", 5, exported=False) as made:
        record, begin, x, packed, columns = made.args
        depth, tokens = code.field(record, Sum.DEPTH), code.field(record, Sum.TOKENS)
        end = code.least(code.plus(begin, TOGETHER), depth)
        row_bytes, panel = code.mul(columns, code.number(size)), code.mul(depth, code.number(LINE))
        whole, rest = code.sdiv(columns, code.number(LANES)), code.srem(columns, code.number(LANES))

        def target(v: Value, t: Value) -> Value:
            p, c = code.sdiv(v, code.number(WIDTH // LANES)), code.srem(v, code.number(WIDTH // LANES))
            return code.plus(packed, (p, panel), (t, LINE), (c, 4 * LANES))

        with code.loop(whole) as v, code.loop(end, begin) as t:
            rows = _tokens(code, kind, x, t, tokens, row_bytes)
            code.write(_words(code, kind, rows, code.mul(v, code.number(LANES * size)), LANES), target(v, t), 64)
        with code.if_then(code.nonzero(rest)), code.loop(end, begin) as t:
            rows = _tokens(code, kind, x, t, tokens, row_bytes)
            code.write(splat(I32, LANES, 0), target(whole, t), 64)
            with code.loop(rest) as c:
                offset = code.mul(code.plus(c, (whole, LANES)), code.number(size))
                code.write(_words(code, kind, rows, offset, 1), code.plus(target(whole, t), (c, 4)), 4)


def _tokens(code: Code, kind: str, x: Value, t: Value, tokens: Value, row_bytes: Value) -> list[Value]:
    """Address of the token at one depth; of `dot` both addresses, and whether there is a second one."""
    if kind != "dot":
        return [code.plus(x, (t, row_bytes))]
    first = code.plus(x, (code.mul(t, code.number(2)), row_bytes))
    there = code.icmp_signed("<", code.plus(code.mul(t, code.number(2)), 1), tokens)
    return [first, code.select(there, code.plus(first, row_bytes), first), there]


def _words(code: Code, kind: str, rows: list[Value], offset: Value, n: int) -> Value:
    """n columns of one depth, 4 bytes each."""
    wide, at = vector(I32, n), code.plus(rows[0], offset)
    if kind != "dot":
        return code.bitcast(numbers.floats(code, kind, at, n), wide)
    low = code.zext(code.read(vector(I16, n), at, 2), wide)
    _, second, there = rows
    high = code.zext(code.read(vector(I16, n), code.plus(second, offset), 2), wide)
    return code.or_(low, code.select(there, code.shl(high, splat(I32, n, 16)), splat(I32, n, 0)))


def _tile(code: Code, kind: str) -> None:
    """`tile(record, i, j)`: 48 columns of x by 48 of y, as far as there are any; if they are the same, on and below the
    diagonal"""
    lanes = code.level.lanes
    across, down = (3, 8) if code.level.vector == 64 else (2, 6)  # vectors, columns of x: what fits into registers
    with code.function("tile", 3, exported=False) as made:
        record, i, j = made.args
        depth, columns = code.field(record, Sum.DEPTH), code.field(record, Sum.COLUMNS_Y)
        xs = code.plus(code.field(record, Sum.PACKED_X), (i, code.mul(depth, code.number(LINE))))
        ys = code.plus(code.field(record, Sum.PACKED_Y), (j, code.mul(depth, code.number(LINE))))
        height = code.least(code.number(WIDTH), code.plus(code.field(record, Sum.COLUMNS_X), (i, -WIDTH)))
        width = code.least(code.number(WIDTH), code.plus(columns, (j, -WIDTH)))
        to = code.plus(code.field(record, Sum.SUM), (i, code.mul(columns, code.number(LINE))), (j, LINE))
        with code.loop(height) as r:  # S comes from memory while products are summed
            for b in range(0, LINE + 64, 64):
                _fetch(code, code.plus(to, (r, code.mul(columns, code.number(4))), b))
        sums = code.room(WIDTH * LINE)
        with code.loop(code.number(WIDTH * LINE), step=4 * lanes) as at:
            code.write(splat(F32, lanes, 0.0), code.plus(sums, at), 4 * lanes)
        with code.loop(depth, step=CHUNK) as begin:
            depths = begin, code.least(code.plus(begin, CHUNK), depth)
            with code.loop(height, step=down) as r:
                reach = code.select(
                    code.icmp_signed("==", xs, ys), code.least(width, code.plus(r, down)), width
                )  # the diagonal's tiles have the same panel on both sides
                ahead = _ahead(code, xs, ys, r, down)
                with code.loop(reach, step=across * lanes) as c:
                    left = code.sdiv(code.plus(code.sub(reach, c), lanes - 1), code.number(lanes))
                    of, sum = (code.plus(xs, (r, 4)), code.plus(ys, (c, 4))), code.plus(sums, (r, LINE), (c, 4))
                    shapes = [(down, n + 1) for n in range(across)]
                    code.cases(
                        code.plus(code.least(left, code.number(across)), -1),
                        *(partial(_multiplied, code, kind, of, sum, depths, shape, ahead) for shape in shapes),
                    )
        _added(code, to, columns, (height, width), sums)


def _ahead(code: Code, xs: Value, ys: Value, r: Value, down: int) -> Value:
    """What to fetch beside the first depth: of the next chunk, x's lines and y's in turns."""
    of_y = code.nonzero(code.and_(code.sdiv(r, code.number(down)), code.number(1)))
    return code.plus(code.select(of_y, ys, xs), (code.sdiv(r, code.number(16)), 64), CHUNK * LINE)


def _fetch(code: Code, address: Value) -> None:
    """Into the second cache."""
    code.intrinsic("llvm.prefetch.p0", VOID, code.inttoptr(address, POINTER), I32(0), I32(2), I32(1))


def _multiplied(
    code: Code,
    kind: str,
    of: tuple[Value, Value],
    to: Value,
    depths: tuple[Value, Value],
    shape: tuple[int, int],
    ahead: Value,
) -> None:
    """Some columns of x by some vectors of y, over some depths, in registers."""
    (xs, ys), (begin, end), (down, across) = of, depths, shape
    lanes = code.level.lanes
    real, multiply = vector(F32, lanes), (_dot if kind == "dot" else _fma)(code, lanes)
    rooms = [[code.variable(real, splat(F32, lanes, 0.0)) for _ in range(across)] for _ in range(down)]
    with code.loop(end, begin) as t:
        line = code.mul(t, code.number(LINE))
        _fetch(code, code.plus(ahead, line))
        y = [code.read(vector(I32, lanes), code.plus(ys, line, 4 * lanes * b), 4 * lanes) for b in range(across)]
        for a, row in enumerate(rooms):
            x = code.spread(code.read(I32, code.plus(xs, line, 4 * a), 4), lanes)
            for b, room in enumerate(row):
                code.set(room, multiply(code.get(room), x, y[b]))
    # a chunk is summed by itself first: sums of many tokens lose less that way
    for a, row in enumerate(rooms):
        for b, room in enumerate(row):
            at = code.plus(to, LINE * a + 4 * lanes * b)
            code.write(code.fadd(code.read(real, at, 4 * lanes), code.get(room)), at, 4 * lanes)


def _dot(code: Code, lanes: int) -> Callable[[Value, Value, Value], Value]:
    """sum + x₀y₀ + x₁y₁ of pairs of bfloat16"""
    pairs, name = vector(_BFloat(), 2 * lanes), f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    return lambda sum, x, y: code.intrinsic(name, sum.type, sum, code.bitcast(x, pairs), code.bitcast(y, pairs))


def _fma(code: Code, lanes: int) -> Callable[[Value, Value, Value], Value]:
    real = vector(F32, lanes)
    return lambda sum, x, y: code.fma(code.bitcast(x, real), code.bitcast(y, real), sum)


def _added(code: Code, to: Value, columns: Value, size: tuple[Value, Value], sums: Value) -> None:
    """S += what was summed, as far as S reaches."""
    lanes, (height, width) = code.level.lanes, size
    whole = code.mul(code.sdiv(width, code.number(lanes)), code.number(lanes))
    with code.loop(height) as r:
        row, of = code.plus(to, (r, code.mul(columns, code.number(4)))), code.plus(sums, (r, LINE))
        for kind, begin, end, step in ((vector(F32, lanes), code.number(0), whole, lanes), (F32, whole, width, 1)):
            with code.loop(end, begin, step) as c:
                at = code.plus(row, (c, 4))
                code.write(code.fadd(code.read(kind, at, 4), code.read(kind, code.plus(of, (c, 4)), 4)), at, 4)

"""A tile: 16 rows of a weight times some rows of x.

    y[m, n] = Σ_g s[n, g] Σ_{r in g} t[m, r] · (Σ_k c·q − z[n, g] Σ_k (q − u) − u Σ_k c)

c are the codes of the weight, with scale s and zero point z for each group g; q those of x, with scale t and zero
point u for each run r.  The bracket is an integer and exact (`integer.py`).  Where x comes as it is, q is x, t = 1
and u = 0 (`real.py`).  The order of additions does not depend on how many rows are computed together: a row of y is
the same number for number, whatever stands beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ...llvm.ir import F32, I8, I32, POINTER, VOID, Code, Type, Value, splat, vector
from ...llvm.numbers import floats
from .codes import Tile
from .finish import finish
from .records import BLOCK, ROWS, Call, Inputs, Weight

LINE = 4 * ROWS  # bytes
AHEAD = 3072  # bytes by which weights are fetched before they are used


class Arithmetic(Protocol):
    """What differs between integers and real numbers."""

    kind: Type  # of an accumulator's elements
    size: int  # bytes of an element of x
    together: tuple[int, ...]  # numbers of rows that are computed together, the largest first, 1 the last

    def block(self, lines: Value, xs: list[Value], sums: list[list[Value]]) -> None:
        """Add a block's products.  lines: address; xs: an address for each row; sums: [row][part] accumulators"""
        ...

    def run(self, sum: Value, scale: Value, total: Value) -> Value:
        """A finished run's sum times the scale of x (its address), added to the group's total."""
        ...


def generate(code: Code, tile: Tile, arithmetic: Arithmetic) -> None:
    """`tile(call, tile, first row, last row)`"""
    finish(code)
    with code.function("tile", 4) as made:
        product = _Product(code, tile, arithmetic, *made.args[:2])
        row = code.variable(made.args[2].type, made.args[2])
        for rows in arithmetic.together:
            with _while_left(code, row, made.args[3], rows) as m:
                product.rows(m, rows)


@contextmanager
def _while_left(code: Code, row: Value, last: Value, count: int) -> Iterator[Value]:
    """Within: the body with m = row, as long as that many rows are left; row moves on."""
    b = code.builder
    head, body, after = (b.append_basic_block(n) for n in ("rows", "some", "left"))
    b.branch(head)
    b.position_at_end(head)
    m = code.get(row)
    b.cbranch(b.icmp_signed("<=", code.plus(m, count), last), body, after)
    b.position_at_end(body)
    yield m
    code.set(row, code.plus(m, count))
    b.branch(head)
    b.position_at_end(after)


class _Product:
    """The loops over groups, runs and blocks."""

    def __init__(self, code: Code, tile: Tile, how: Arithmetic, call: Value, at: Value) -> None:
        self.code, self.tile, self.how, self.call, self.at = code, tile, how, call, at
        self.n, self.parts = code.level.lanes, ROWS // code.level.lanes
        weight, inputs = code.field(call, Call.WEIGHT), code.field(call, Call.INPUTS)
        self.runs = code.field(inputs, Inputs.RUNS)
        self.blocks, self.groups, self.per_group = (
            code.field(weight, place) for place in (Weight.BLOCKS, Weight.SCALES_COUNT, Weight.PER_SCALE)
        )
        self.x, self.x_scales, self.negative, self.shifts = (
            code.field(call, place) for place in (Call.PREPARED, Call.SCALES, Call.NEGATIVE, Call.SHIFTS)
        )
        self.codes = code.plus(
            code.field(weight, Weight.CODES), (at, code.mul(code.mul(self.runs, self.blocks), code.number(self.block)))
        )
        width = 4 if tile.scale == "float32" else 2
        self.scales, self.zeros, self.sums = (
            code.plus(code.field(weight, place), (at, code.mul(count, code.number(ROWS * size))))
            for place, count, size in (
                (Weight.SCALES, self.groups, width),
                (Weight.ZEROS, self.groups, 1),
                (Weight.SUMS, self.runs, 4),
            )
        )
        self.scale_width = width

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.tile.bits * LINE

    def rows(self, m: Value, count: int) -> None:
        """Rows m .. m + count of x, all of the tile."""
        code, n = self.code, self.n
        # two rows by 7 or 8 registers a block ask for enough by themselves: fetched ahead as well they take a quarter
        # longer (Zen 4)
        busy = count == 2 and self.tile.bits >= 7 and code.level.vector == 64
        float_kind, sum_kind = vector(F32, n), vector(self.how.kind, n)
        y, total = ([[code.variable(float_kind) for _ in range(self.parts)] for _ in range(count)] for _ in range(2))
        sums = [[code.variable(sum_kind) for _ in range(self.parts)] for _ in range(count)]
        _clear(code, y)
        first = code.variable(m.type, code.number(0))
        with code.loop(self.groups) as g:
            _clear(code, total)
            start = code.get(first)
            end = code.least(code.plus(start, self.per_group), self.runs)
            code.set(first, end)
            with code.loop(end, start) as r:
                self._start(m, g, r, sums)
                with code.loop(self.blocks) as i:
                    at = code.plus(i, (r, self.blocks))
                    xs = [code.plus(self.x, (self._place(m, k, at), BLOCK * self.how.size)) for k in range(count)]
                    lines = code.plus(self.codes, (at, self.block))
                    if not busy:
                        self._fetch_ahead(lines)
                    self.how.block(lines, xs, sums)
                for k, h in self._each(count):
                    scale = self._of(self.x_scales, m, k, r)
                    code.set(total[k][h], self.how.run(code.get(sums[k][h]), scale, code.get(total[k][h])))
            for h in range(self.parts):
                s = floats(
                    code,
                    self.tile.scale,
                    code.plus(self.scales, (code.plus(self._lane(h), (g, ROWS)), self.scale_width)),
                    n,
                )
                for k in range(count):
                    code.set(y[k][h], code.fma(code.get(total[k][h]), s, code.get(y[k][h])))
        room = code.room(LINE)
        for k in range(count):
            for h in range(self.parts):
                code.write(code.get(y[k][h]), code.plus(room, 4 * n * h), 4 * n)
            code.call(code.module.globals["finish"], [self.call, self.at, code.plus(m, k), room])

    def _fetch_ahead(self, lines: Value) -> None:
        """A single row of x waits for memory, which delivers more if it is asked early; many pass over a tile that only
        the second cache holds."""
        code = self.code
        for line in range(self.tile.bits):
            at = code.inttoptr(code.plus(lines, AHEAD + LINE * line), POINTER)
            code.intrinsic("llvm.prefetch.p0", VOID, at, I32(0), I32(3), I32(1))

    def _start(self, m: Value, g: Value, r: Value, sums: list[list[Value]]) -> None:
        """−z Σ (q − u) − u Σ c"""
        code, n, kind = self.code, self.n, self.how.kind
        is_float = kind is F32
        times, plus = (code.fmul, code.fadd) if is_float else (code.mul, code.add)
        for h in range(self.parts):
            zero = c = None
            if self.tile.zeros:
                zero = code.read(vector(I8, n), code.plus(self.zeros, self._lane(h), (g, ROWS)))
                zero = code.uitofp(zero, vector(F32, n)) if is_float else code.zext(zero, vector(I32, n))
            if self.tile.sums:
                c = code.read(vector(I32, n), code.plus(self.sums, (code.plus(self._lane(h), (r, ROWS)), 4)), 4)
            for k, row in enumerate(sums):
                found = code.read(kind, self._of(self.negative, m, k, r), 4)
                negative = code.spread(found, n)
                start = times(negative, splat(kind, n, 2 ** (self.tile.bits - 1)) if zero is None else zero)
                if c is not None:
                    shift = code.read(I32, self._of(self.shifts, m, k, r), 4)
                    start = plus(start, code.mul(c, code.spread(shift, n)))
                code.set(row[h], start)

    def _lane(self, part: int) -> Value:
        return self.code.number(part * self.n)

    def _place(self, m: Value, k: int, at: Value) -> Value:
        """The number of a block of x: of row m + k, the at-th."""
        return self.code.plus(at, (self.code.plus(m, k), self.code.mul(self.runs, self.blocks)))

    def _of(self, table: Value, m: Value, k: int, r: Value) -> Value:
        """Address in a table of 4-byte numbers [rows, runs]."""
        return self.code.plus(table, (self.code.plus(r, (self.code.plus(m, k), self.runs)), 4))

    def _each(self, count: int) -> list[tuple[int, int]]:
        return [(k, h) for k in range(count) for h in range(self.parts)]


def _clear(code: Code, rooms: list[list[Value]]) -> None:
    for row in rooms:
        for room in row:
            code.set(room, splat(F32, room.allocated_type.count, 0.0))

"""All queries of a head over all its tokens: softmax(q Kᵀ) V in float32, a group of tokens at a time.

`keys` compares a token's key with the queries; a value's weight takes the value's scale.  The softmax is kept relative
to the largest score so far.  A thread does a head, so codes are read once, and in one order: the same bytes for any
number of threads.
"""

import math
from enum import IntEnum

from ...llvm.ir import F16, F32, I8, I32, Code, Value
from ...llvm.lanes import everywhere, exp2, larger
from ...llvm.strips import FIRST, FLOATS, LINE, N, constant, floats, scalar
from .keys import Floats, Integers, Shape, read, stored

CHUNK = 64  # recent tokens that are looked at together


class Attend(IntEnum):
    """What is told."""

    QUERY = FIRST  # float32 [batch·heads, queries, size]
    FACTOR = FIRST + 1  # float32 [1], of all scores: the softmax is one of powers of 2
    KEYS = FIRST + 2  # [batch·heads, past, size] packed
    KEY_SCALE = FIRST + 3  # float16 [batch·heads, groups, size]
    KEY_LOW = FIRST + 4
    VALUES = FIRST + 5  # [batch·heads, past, value size] packed
    VALUE_SCALE = FIRST + 6  # float16 [batch·heads, past, shares]
    VALUE_LOW = FIRST + 7
    PAST = FIRST + 8
    NEW_KEYS = FIRST + 9  # [batch·heads, recent, size]
    NEW_VALUES = FIRST + 10
    RECENT = FIRST + 11
    MASK = FIRST + 12  # bool [batch, past + recent]
    HEADS = FIRST + 13
    Y = FIRST + 14  # float32 [batch·heads, queries, value size]


class Head:
    """The code for one."""

    def __init__(self, code: Code, record: Value, head: Value, shape: Shape) -> None:
        self.code, self.record, self.head, self.shape = code, record, head, shape
        self.queries = range(shape.queries)
        self.width = 4 * N * -(-max(shape.group, CHUNK) // N)  # bytes of a query's scores
        self.scores, self.sums = (code.room(shape.queries * n) for n in (self.width, 4 * shape.value_size))
        query = self.place(Attend.QUERY, shape.queries, 4 * shape.size)
        self.keys = (Integers if shape.rounded else Floats)(code, shape, query, code.field(record, Attend.FACTOR))
        self.top, self.total, self.shrink = ([code.variable(FLOATS) for _ in self.queries] for _ in range(3))

    def place(self, of: Attend, rows: Value | int, row: int, start: Value | int = 0) -> Value:
        """Address of a row of this head's `rows`, which are `row` bytes each."""
        code, rows = self.code, self.code.number(rows) if isinstance(rows, int) else rows
        return code.plus(code.field(self.record, of), (code.plus(code.mul(self.head, rows), start), row))

    def generate(self) -> None:
        code, shape = self.code, self.shape
        with code.loop(code.number(shape.queries * 4 * shape.value_size), step=LINE) as at:
            code.write(constant(0.0), code.plus(self.sums, at), 4)
        for q in self.queries:
            code.set(self.top[q], constant(-math.inf))
            code.set(self.total[q], constant(0.0))
        past, recent = (code.field(self.record, place) for place in (Attend.PAST, Attend.RECENT))
        of, group = (Attend.KEY_SCALE, Attend.KEY_LOW), code.number(shape.group)
        with code.loop(past, step=shape.group) as start:
            at = code.sdiv(start, group)
            self.keys.start_group(*(self.place(each, code.sdiv(past, group), 2 * shape.size, at) for each in of))
            self.chunk(start, group, past, None)
        self.keys.start()
        with code.loop(recent, step=CHUNK) as start:
            self.chunk(start, code.least(code.number(CHUNK), code.sub(recent, start)), recent, shape.kind)
        y = self.place(Attend.Y, shape.queries, 4 * shape.value_size)
        for q in self.queries:
            total = everywhere(code, code.get(self.total[q]), code.fadd)
            with code.loop(code.number(4 * shape.value_size), step=LINE) as c:
                at = code.plus(c, 4 * shape.value_size * q)
                code.write(code.fdiv(floats(code, code.plus(self.sums, at)), total), code.plus(y, at), 4)

    def chunk(self, start: Value, count: Value, all_: Value, kind: str | None) -> None:
        """Tokens that share their scales, or recent ones of a kind."""
        code = self.code
        with code.loop(code.number(self.width * self.shape.queries), step=LINE) as at:
            code.write(constant(-math.inf), code.plus(self.scores, at), 4)
        self.compare(start, count, all_, kind)
        for q in self.queries:
            self.weigh(q)
        for first in range(0, self.shape.value_size, self.shape.channels):
            most = N * max(1, 16 // self.shape.queries)
            end = first + self.shape.channels
            for c in range(first, end, most):
                self.mix(start, count, all_, kind, range(c, min(c + most, end), N))

    def compare(self, start: Value, count: Value, all_: Value, kind: str | None) -> None:
        """Scores of these tokens."""
        code, row = self.code, stored(self.shape.bits, kind, self.shape.size)
        keys = self.place(Attend.NEW_KEYS if kind else Attend.KEYS, all_, row, start)
        offset = code.field(self.record, Attend.PAST) if kind else 0
        with code.loop(count) as t:
            for q, score in enumerate(self.keys.scores(code.plus(keys, (t, row)), kind)):
                one = self.hidden(code.extract_element(score, I32(0)), code.plus(start, t, offset))
                code.write(one, code.plus(self.scores, (t, 4), self.width * q), 4)

    def hidden(self, score: Value, token: Value) -> Value:
        if not self.shape.masked:
            return score
        code, record = self.code, self.record
        past, recent, heads = (code.field(record, of) for of in (Attend.PAST, Attend.RECENT, Attend.HEADS))
        row = code.mul(code.sdiv(self.head, heads), code.add(past, recent))
        seen = code.read(I8, code.plus(code.field(record, Attend.MASK), row, token))
        return code.select(code.nonzero(seen), score, F32(-math.inf))

    def weigh(self, q: int) -> None:
        """Scores become weights relative to the largest so far."""
        code, scores = self.code, self.code.plus(self.scores, self.width * q)
        old, largest = code.get(self.top[q]), code.variable(FLOATS, constant(-math.inf))
        with code.loop(code.number(self.width), step=LINE) as at:
            code.set(largest, larger(code, floats(code, code.plus(scores, at)), code.get(largest)))
        top = larger(code, old, everywhere(code, code.get(largest), lambda a, b: larger(code, a, b)))
        code.set(self.top[q], top)
        nothing = code.fcmp_ordered("==", top, constant(-math.inf))  # to look at yet
        top = code.select(nothing, constant(0.0), top)
        code.set(self.shrink[q], exp2(code, code.fsub(old, top)))
        code.set(self.total[q], code.fmul(code.get(self.total[q]), code.get(self.shrink[q])))
        with code.loop(code.number(self.width), step=LINE) as at:
            weight = exp2(code, code.fsub(floats(code, code.plus(scores, at)), top))
            code.write(weight, code.plus(scores, at), 4)
            code.set(self.total[q], code.fadd(code.get(self.total[q]), weight))

    def mix(self, start: Value, count: Value, all_: Value, kind: str | None, channels: range) -> None:
        """Sums of some channels of values that share their scale."""
        code, shape = self.code, self.shape
        row = stored(shape.bits, kind, shape.value_size)
        values = self.place(Attend.NEW_VALUES if kind else Attend.VALUES, all_, row, start)
        places = [[code.plus(self.sums, 4 * (shape.value_size * q + c)) for c in channels] for q in self.queries]
        rooms = [
            [code.variable(FLOATS, code.fmul(floats(code, at), code.get(self.shrink[q]))) for at in places[q]]
            for q in self.queries
        ]
        lows = [code.variable(FLOATS, constant(0.0)) for _ in self.queries]
        with code.loop(count) as t:
            token = code.plus(values, (t, row))
            found = [read(code, code.plus(token, stored(shape.bits, kind, c)), shape.bits, kind) for c in channels]
            scale, low = (None, None) if kind else self.shared(code.plus(start, t), all_, channels.start)
            for q in self.queries:
                weight = scalar(code, code.plus(self.scores, (t, 4), self.width * q))
                if scale is not None:
                    code.set(lows[q], code.fma(weight, low, code.get(lows[q])))
                    weight = code.fmul(weight, scale)
                for room, value in zip(rooms[q], found, strict=True):
                    code.set(room, code.fma(weight, value, code.get(room)))
        for q in self.queries:
            for at, room in zip(places[q], rooms[q], strict=True):
                code.write(code.fadd(code.get(room), code.get(lows[q])), at, 4)

    def shared(self, token: Value, all_: Value, channel: int) -> list[Value]:
        """Scale and low of a token's value, in all lanes."""
        code, shares = self.code, self.shape.value_size // self.shape.channels
        at = 2 * (channel // self.shape.channels)
        of = (Attend.VALUE_SCALE, Attend.VALUE_LOW)
        halves = [code.read(F16, code.plus(self.place(place, all_, 2 * shares, token), at), 2) for place in of]
        return [code.spread(code.fpext(half, F32), N) for half in halves]

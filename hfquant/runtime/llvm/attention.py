"""One query over a cache of 8 bit, read packed: softmax(q Kᵀ) V in float32, a group of tokens at a time.

A key is scale·code + low in every channel, for a group of tokens: the query is multiplied by the scales once, and by
the lows, so that each token costs products with its codes.  A value's weight takes its scale.  The softmax is kept
relative to the largest score so far.  A thread does all queries of a head together, so codes are read once, and in one
order: the same bytes for any number of threads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...llvm import numbers
from ...llvm.ir import F16, F32, I8, I32, Code, Value, splat, vector
from ...llvm.strips import FIRST, FLOATS, LINE, Loop, N, constant, floats, nearest, scalar

if TYPE_CHECKING:
    from ..kv_packed import PackedTokens

CHUNK = 64  # recent tokens that are looked at together
MOST = 256  # tokens of a group, channels of a head: what the stack holds
QUERIES = 8  # of a head, at most: their sums stay in registers
LOG2E = math.log2(math.e)


class Attend(IntEnum):
    """What `attend` is told."""

    QUERY = FIRST  # float32 [batch·heads, queries, size], times scale·log₂e
    KEYS = FIRST + 1  # uint8 [batch·heads, past, size]
    KEY_SCALE = FIRST + 2  # float16 [batch·heads, groups, size]
    KEY_LOW = FIRST + 3
    VALUES = FIRST + 4  # uint8 [batch·heads, past, value size]
    VALUE_SCALE = FIRST + 5  # float16 [batch·heads, past, shares]
    VALUE_LOW = FIRST + 6
    PAST = FIRST + 7
    NEW_KEYS = FIRST + 8  # [batch·heads, recent, size]
    NEW_VALUES = FIRST + 9
    RECENT = FIRST + 10
    MASK = FIRST + 11  # bool [batch, past + recent]
    HEADS = FIRST + 12
    Y = FIRST + 13  # float32 [batch·heads, queries, value size]


@dataclass(frozen=True)
class Shape:
    """What the code depends on.  kind: the type of recent tokens."""

    queries: int
    size: int
    value_size: int
    group: int
    channels: int
    kind: str
    masked: bool


def refuses(layer: "PackedTokens", queries: int) -> str | None:
    """Why such a cache is not read packed; None if it is."""
    if layer.bits != 8:
        return f"{layer.bits} bits: not 8"
    if layer.sizes[0] % N or layer.channels % N:
        return f"{layer.sizes[0]} channels of keys, {layer.channels} that share a scale: not multiples of {N}"
    if max(*layer.sizes, layer.group) > MOST:
        return f"heads of {max(layer.sizes)} channels, groups of {layer.group} tokens: more than {MOST}"
    return f"{queries} queries of a head: more than {QUERIES}" if queries > QUERIES else None


def attend(
    query: Tensor, layer: "PackedTokens", recent: tuple[Tensor, Tensor], scale: float, mask: Tensor | None
) -> Tensor | None:
    """As `kv_packed.attend`, whose arguments these are; None if the code could not be made."""
    keys, values = (t.contiguous() for t in recent)
    batch, heads, new = keys.shape[:3]
    kind = str(keys.dtype).removeprefix("torch.")
    if kind not in numbers.TYPES or values.dtype != keys.dtype:
        keys, values, kind = keys.float(), values.float(), "float32"
    shape = Shape(query.shape[1] // heads, *layer.sizes, layer.group, layer.channels, kind, mask is not None)
    q = (query.float() * (scale * LOG2E)).contiguous()
    y = torch.empty(*query.shape[:2], layer.sizes[1])
    places: dict[IntEnum, Tensor | int] = {
        Attend.QUERY: q, Attend.KEYS: layer.key_words.contiguous(), Attend.KEY_SCALE: layer.key_scale.contiguous(),
        Attend.KEY_LOW: layer.key_low.contiguous(), Attend.VALUES: layer.value_words.contiguous(),
        Attend.VALUE_SCALE: layer.value_scale.contiguous(), Attend.VALUE_LOW: layer.value_low.contiguous(),
        Attend.PAST: layer.past, Attend.NEW_KEYS: keys, Attend.NEW_VALUES: values, Attend.RECENT: new,
        Attend.MASK: 0 if mask is None else mask.contiguous(), Attend.HEADS: heads, Attend.Y: y,
    }  # fmt: skip
    return y.to(query.dtype) if _loop(shape)(batch * heads, places) else None


@cache
def _loop(shape: Shape) -> Loop:
    def body(code: Code, record: Value, strip: Value) -> None:
        _Head(code, record, strip, shape).generate()

    return Loop(repr(shape), body)


class _Head:
    """All queries of one head."""

    def __init__(self, code: Code, record: Value, head: Value, shape: Shape) -> None:
        self.code, self.record, self.head, self.shape = code, record, head, shape
        self.queries = range(shape.queries)
        self.width = 4 * N * -(-max(shape.group, CHUNK) // N)  # bytes of a query's scores
        self.query = self.place(Attend.QUERY, shape.queries, 4 * shape.size)
        self.scores, self.scaled, self.sums = (
            code.room(shape.queries * n) for n in (self.width, 4 * shape.size, 4 * shape.value_size)
        )
        self.top, self.total, self.base, self.shrink = ([code.variable(FLOATS) for _ in self.queries] for _ in range(4))

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
        with code.loop(past, step=shape.group) as start:
            self.scale_queries(code.sdiv(start, code.number(shape.group)), code.sdiv(past, code.number(shape.group)))
            self.chunk(start, code.number(shape.group), past, None)
        with code.loop(code.number(shape.queries * 4 * shape.size), step=LINE) as at:
            code.write(floats(code, code.plus(self.query, at)), code.plus(self.scaled, at), 4)
        for q in self.queries:
            code.set(self.base[q], constant(0.0))
        with code.loop(recent, step=CHUNK) as start:
            self.chunk(start, code.least(code.number(CHUNK), code.sub(recent, start)), recent, shape.kind)
        y = self.place(Attend.Y, shape.queries, 4 * shape.value_size)
        for q in self.queries:
            total = _everywhere(code, code.get(self.total[q]), code.fadd)
            with code.loop(code.number(4 * shape.value_size), step=LINE) as c:
                at = code.plus(c, 4 * shape.value_size * q)
                code.write(code.fdiv(floats(code, code.plus(self.sums, at)), total), code.plus(y, at), 4)

    def scale_queries(self, group: Value, groups: Value) -> None:
        """The queries by the scales of a group of keys, and their products with its lows."""
        code, row = self.code, 4 * self.shape.size
        scale, low = (self.place(of, groups, 2 * self.shape.size, group) for of in (Attend.KEY_SCALE, Attend.KEY_LOW))
        for q in self.queries:
            code.set(self.base[q], constant(0.0))
        with code.loop(code.number(self.shape.size), step=N) as c:
            by, plus = (numbers.floats(code, "float16", code.plus(at, (c, 2)), N) for at in (scale, low))
            for q in self.queries:
                value = floats(code, code.plus(self.query, (c, 4), row * q))
                code.write(code.fmul(value, by), code.plus(self.scaled, (c, 4), row * q), 4)
                code.set(self.base[q], code.fma(value, plus, code.get(self.base[q])))
        for q in self.queries:
            code.set(self.base[q], _everywhere(code, code.get(self.base[q]), code.fadd))

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
        code, size = self.code, self.shape.size
        bytes_ = _bytes(kind)
        keys = self.place(Attend.NEW_KEYS if kind else Attend.KEYS, all_, bytes_ * size, start)
        offset = code.field(self.record, Attend.PAST) if kind else 0
        with code.loop(count) as t:
            rooms = [code.variable(FLOATS, constant(0.0)) for _ in self.queries]
            for c in range(0, size, N):
                key = _read(code, code.plus(keys, (t, bytes_ * size), bytes_ * c), kind)
                for q, room in enumerate(rooms):
                    by = floats(code, code.plus(self.scaled, 4 * (size * q + c)))
                    code.set(room, code.fma(key, by, code.get(room)))
            for q, room in enumerate(rooms):
                score = code.fadd(_everywhere(code, code.get(room), code.fadd), code.get(self.base[q]))
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
            code.set(largest, _larger(code, floats(code, code.plus(scores, at)), code.get(largest)))
        top = _larger(code, old, _everywhere(code, code.get(largest), lambda a, b: _larger(code, a, b)))
        code.set(self.top[q], top)
        nothing = code.fcmp_ordered("==", top, constant(-math.inf))  # to look at yet
        top = code.select(nothing, constant(0.0), top)
        code.set(self.shrink[q], _exp2(code, code.fsub(old, top)))
        code.set(self.total[q], code.fmul(code.get(self.total[q]), code.get(self.shrink[q])))
        with code.loop(code.number(self.width), step=LINE) as at:
            weight = _exp2(code, code.fsub(floats(code, code.plus(scores, at)), top))
            code.write(weight, code.plus(scores, at), 4)
            code.set(self.total[q], code.fadd(code.get(self.total[q]), weight))

    def mix(self, start: Value, count: Value, all_: Value, kind: str | None, channels: range) -> None:
        """Sums of some channels of values that share their scale."""
        code, shape = self.code, self.shape
        row = _bytes(kind) * shape.value_size
        values = self.place(Attend.NEW_VALUES if kind else Attend.VALUES, all_, row, start)
        places = [[code.plus(self.sums, 4 * (shape.value_size * q + c)) for c in channels] for q in self.queries]
        rooms = [
            [code.variable(FLOATS, code.fmul(floats(code, at), code.get(self.shrink[q]))) for at in places[q]]
            for q in self.queries
        ]
        lows = [code.variable(FLOATS, constant(0.0)) for _ in self.queries]
        with code.loop(count) as t:
            found = [_read(code, code.plus(values, (t, row), _bytes(kind) * c), kind) for c in channels]
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


def _bytes(kind: str | None) -> int:
    return 1 if kind is None else numbers.SIZES[numbers.TYPES.index(kind)]


def _read(code: Code, address: Value, kind: str | None) -> Value:
    """A strip of codes, or of numbers of a kind."""
    if kind is None:
        return code.uitofp(code.read(vector(I8, N), address), FLOATS)
    return numbers.floats(code, kind, address, N)


def _everywhere(code: Code, value: Value, join: Callable[[Value, Value], Value]) -> Value:
    """All lanes joined, in all lanes."""
    for k in (8, 4, 2, 1):
        value = join(value, code.shuffle(value, [i ^ k for i in range(N)]))
    return value


def _larger(code: Code, a: Value, b: Value) -> Value:
    return code.select(code.fcmp_ordered(">", a, b), a, b)


def _exp2(code: Code, x: Value) -> Value:
    """2ˣ for x up to 0, by Taylor's series around the nearest integer: to float32's last places; 0 below 2⁻¹²⁶"""
    x = _larger(code, constant(-127.0), x)  # NaN stays
    whole = nearest(code, x)
    rest, found = code.fsub(x, whole), constant(math.log(2) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):
        found = code.fma(found, rest, constant(math.log(2) ** k / math.factorial(k)))
    power = code.add(code.fptosi(whole, vector(I32, N)), splat(I32, N, 127))
    return code.fmul(found, code.bitcast(code.shl(power, splat(I32, N, 23)), FLOATS))

"""Queries against keys, for `head`: in float32, or, where queries are rounded, in integers.

A key is scale·code + low in every channel, for a group of tokens: the query is multiplied by the scales once, and by
the lows, so that each token costs products with its codes.  A query times the scales has the channels that are large
in every key made even, as SmoothQuant does for a layer (Xiao et al., 2022, arXiv:2211.10438): that is what is rounded.
"""

from dataclasses import dataclass

from ...llvm import numbers
from ...llvm.ir import I8, I16, I32, Code, Value, splat, vector
from ...llvm.lanes import everywhere, larger
from ...llvm.strips import FLOATS, LINE, N, constant, floats, nearest, scalar

TOP = 127  # the largest code of a query
BYTES = 4 * N  # codes that are multiplied and summed at a time


@dataclass(frozen=True)
class Shape:
    """What the code depends on.  kind: the type of recent tokens; rounded: whether queries are."""

    queries: int
    size: int
    value_size: int
    bits: int
    group: int
    channels: int
    kind: str
    masked: bool
    rounded: bool


class Floats:
    """Scores of tokens by all queries of a head, in float32.  query: address, float32 [queries, size]; factor: of all
    scores, address of a float32."""

    def __init__(self, code: Code, shape: Shape, query: Value, factor: Value) -> None:
        self.code, self.shape, self.query, self.factor = code, shape, query, scalar(code, factor)
        self.queries, self.row = range(shape.queries), 4 * shape.size
        self.scaled = code.room(shape.queries * self.row)
        self.base = [code.variable(FLOATS) for _ in self.queries]

    def start(self) -> None:
        """For tokens that are not packed."""
        code = self.code
        with code.loop(code.number(self.shape.queries * self.row), step=LINE) as at:
            code.write(floats(code, code.plus(self.query, at)), code.plus(self.scaled, at), 4)
        for room in self.base:
            code.set(room, constant(0.0))

    def start_group(self, scale: Value, low: Value) -> None:
        """For tokens whose keys have these scales and lows, addresses of float16 [size]."""
        code = self.code
        for room in self.base:
            code.set(room, constant(0.0))
        with code.loop(code.number(self.shape.size), step=N) as c:
            by, plus = (numbers.floats(code, "float16", code.plus(at, (c, 2)), N) for at in (scale, low))
            for q, room in enumerate(self.base):
                value = floats(code, code.plus(self.query, (c, 4), self.row * q))
                code.write(code.fmul(value, by), code.plus(self.scaled, (c, 4), self.row * q), 4)
                code.set(room, code.fma(value, plus, code.get(room)))
        for room in self.base:
            code.set(room, everywhere(code, code.get(room), code.fadd))

    def scores(self, key: Value, kind: str | None) -> list[Value]:
        """Of a token, in all lanes.  kind: the type of its key; None: packed"""
        code, products = self.code, self.products(key, kind)
        sums = (code.fadd(product, code.get(base)) for product, base in zip(products, self.base, strict=True))
        return [code.fmul(sum, self.factor) for sum in sums]

    def products(self, key: Value, kind: str | None) -> list[Value]:
        code, shape = self.code, self.shape
        rooms = [code.variable(FLOATS, constant(0.0)) for _ in self.queries]
        for c in range(0, shape.size, N):
            value = read(code, code.plus(key, stored(shape.bits, kind, c)), shape.bits, kind)
            for q, room in enumerate(rooms):
                by = floats(code, code.plus(self.scaled, self.row * q + 4 * c))
                code.set(room, code.fma(value, by, code.get(room)))
        return [everywhere(code, code.get(room), code.fadd) for room in rooms]


class Integers(Floats):
    """Queries times scales are rounded to 8 bit, with one step for a query and a group of tokens."""

    def __init__(self, code: Code, shape: Shape, query: Value, factor: Value) -> None:
        super().__init__(code, shape, query, factor)
        self.whole = -(-shape.size // BYTES) * BYTES
        self.codes = code.room(shape.queries * self.whole)
        self.step = [code.variable(FLOATS) for _ in self.queries]
        with code.loop(code.number(shape.queries * self.whole), step=BYTES) as at:
            code.write(splat(I8, BYTES, 0), code.plus(self.codes, at), BYTES)

    def start_group(self, scale: Value, low: Value) -> None:
        super().start_group(scale, low)
        code = self.code
        for q in self.queries:
            most = code.variable(FLOATS, constant(0.0))
            with code.loop(code.number(self.row), step=LINE) as c:
                value = floats(code, code.plus(self.scaled, c, self.row * q))
                magnitude = code.intrinsic(f"llvm.fabs.v{N}f32", FLOATS, value)
                code.set(most, larger(code, magnitude, code.get(most)))
            largest = everywhere(code, code.get(most), lambda a, b: larger(code, a, b))
            step = code.fdiv(largest, constant(TOP))
            step = code.select(code.fcmp_ordered(">", step, constant(0.0)), step, constant(1.0))
            code.set(self.step[q], step)
            with code.loop(code.number(self.shape.size), step=N) as c:
                value = code.fdiv(floats(code, code.plus(self.scaled, (c, 4), self.row * q)), step)
                value = larger(code, value, constant(-TOP))  # what is not a number is one here: base still says it
                value = nearest(code, code.select(code.fcmp_ordered("<", value, constant(TOP)), value, constant(TOP)))
                octets = code.trunc(code.fptosi(value, vector(I32, N)), vector(I8, N))
                code.write(octets, code.plus(self.codes, c, self.whole * q), N)

    def products(self, key: Value, kind: str | None) -> list[Value]:
        if kind is not None:
            return super().products(key, kind)
        code, size, bits = self.code, self.shape.size, self.shape.bits
        sums = [splat(I32, N, 0) for _ in self.queries]
        for c in range(0, size, BYTES):
            keys = padded(code, codes(code, code.plus(key, stored(bits, None, c)), bits, min(BYTES, size - c)))
            for q in self.queries:
                by = code.read(vector(I8, BYTES), code.plus(self.codes, self.whole * q + c), BYTES)
                sums[q] = multiplied(code, sums[q], keys, by)
        found = (code.sitofp(everywhere(code, sum, code.add), FLOATS) for sum in sums)
        return [code.fmul(sum, code.get(step)) for sum, step in zip(found, self.step, strict=True)]


def multiplied(code: Code, sums: Value, a: Value, b: Value) -> Value:
    """int32 [16] + Σ of 4 products of a, uint8 [64], by b, int8 [64]; exact"""
    if code.level.dot == "vnni" and code.level.vector == BYTES:
        return code.intrinsic("llvm.x86.avx512.vpdpbusd.512", vector(I32, N), sums, a, b)
    halves = []
    for h in range(2):
        sum, x, y = (code.shuffle(v, range(h * n, h * n + n)) for v, n in ((sums, N // 2), (a, 2 * N), (b, 2 * N)))
        if code.level.dot == "vnni":
            halves.append(code.intrinsic("llvm.x86.avx512.vpdpbusd.256", vector(I32, N // 2), sum, x, y))
            continue
        # whole bytes by whole bytes do not fit into 16 bits in pairs, as `vpmaddubsw` sums them
        x, y = code.zext(x, vector(I32, 2 * N)), code.sext(y, vector(I32, 2 * N))
        if code.level.dot == "madd":
            x, y = (code.trunc(v, vector(I16, 2 * N)) for v in (x, y))
            pairs = code.join([_pairs(code, x, y, 0), _pairs(code, x, y, N)])
        else:
            every = code.mul(x, y)
            pairs = code.add(code.shuffle(every, range(0, 2 * N, 2)), code.shuffle(every, range(1, 2 * N, 2)))
        fours = code.add(code.shuffle(pairs, range(0, N, 2)), code.shuffle(pairs, range(1, N, 2)))
        halves.append(code.add(sum, fours))
    return code.join(halves)


def _pairs(code: Code, x: Value, y: Value, start: int) -> Value:
    a, b = (code.shuffle(v, range(start, start + N)) for v in (x, y))
    return code.intrinsic("llvm.x86.avx2.pmadd.wd", vector(I32, N // 2), a, b)


def padded(code: Code, octets: Value) -> Value:
    """[n] -> [64], zeros behind"""
    n = octets.type.count
    return octets if n == BYTES else code.shuffle(octets, [min(i, n) for i in range(BYTES)], splat(I8, n, 0))


def stored(bits: int, kind: str | None, n: int) -> int:
    """Bytes of so many channels of a kind; None: packed."""
    return n * bits // 8 if kind is None else n * numbers.SIZES[numbers.TYPES.index(kind)]


def read(code: Code, address: Value, bits: int, kind: str | None) -> Value:
    """A strip of codes, or of numbers of a kind, in float32."""
    if kind is None:
        return code.uitofp(codes(code, address, bits, N), FLOATS)
    return numbers.floats(code, kind, address, N)


def codes(code: Code, address: Value, bits: int, n: int) -> Value:
    """uint8 [n], from bit fields of bytes."""
    octets = code.read(vector(I8, n * bits // 8), address)
    if bits == 8:
        return octets
    fields, m = 8 // bits, octets.type.count
    parts = [code.and_(code.lshr(octets, splat(I8, m, bits * j)), splat(I8, m, 2**bits - 1)) for j in range(fields)]
    return code.shuffle(code.join(parts), [i % fields * m + i // fields for i in range(n)])

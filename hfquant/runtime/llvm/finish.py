"""The end of a tile's row: low-rank correction, bias, and the type of y."""

from ...llvm.ir import F32, I8, Code, Value, vector
from ...llvm.numbers import SIZES, TYPES, floats, typed
from .records import ROWS, Call, Weight

N = 8  # floats handled together


def finish(code: Code) -> None:
    """`finish(call, tile, row, room)`: room holds 16 float32 results."""
    with code.function("finish", 4, exported=False) as made:
        call, tile, row, room = made.args
        weight = code.field(call, Call.WEIGHT)
        out, rank = code.field(weight, Weight.OUT), code.field(weight, Weight.RANK)
        with code.if_then(code.nonzero(rank), likely=False):
            _correct(code, call, weight, rank, tile, row, room)
        first = code.mul(tile, code.number(ROWS))
        count = code.least(code.sub(out, first), code.number(ROWS))
        whole = code.icmp_signed("==", count, code.number(ROWS))
        with code.if_else(whole, likely=True) as (all_of_them, some):
            with all_of_them, code.loop(code.number(ROWS), step=N) as i:
                _store(code, call, out, first, row, room, i, N)
            with some, code.loop(count) as i:
                _store(code, call, out, first, row, room, i, 1)


def _correct(code: Code, call: Value, weight: Value, rank: Value, tile: Value, row: Value, room: Value) -> None:
    """Add Σ_j inner[row, j] · U[n, j]."""
    factors = code.plus(code.field(weight, Weight.FACTORS), (code.mul(tile, rank), ROWS))
    inner = code.plus(code.field(call, Call.INNER), (code.mul(row, rank), 4))
    with code.loop(rank) as j:
        t = code.spread(code.read(F32, code.plus(inner, (j, 4)), 4), N)
        for h in range(0, ROWS, N):
            u = code.sitofp(code.read(vector(I8, N), code.plus(factors, (j, ROWS), h)), vector(F32, N))
            at = code.plus(room, 4 * h)
            code.write(code.fma(u, t, code.read(vector(F32, N), at)), at)


def _store(code: Code, call: Value, out: Value, first: Value, row: Value, room: Value, i: Value, n: int) -> None:
    """n results from the i-th on."""
    kind = vector(F32, n)
    y = code.variable(kind, code.read(kind, code.plus(room, (i, 4)), 4))
    bias = code.field(call, Call.BIAS)

    def add(place: int) -> None:
        at = code.plus(bias, (code.plus(first, i), SIZES[place]))
        code.set(y, code.fadd(code.get(y), floats(code, TYPES[place], at, n)))

    with code.if_then(code.nonzero(bias)):
        code.cases(code.field(call, Call.BIAS_KIND), *(lambda p=p: add(p) for p in range(len(TYPES))))

    def store(place: int) -> None:
        at = code.plus(code.plus(first, i), (row, out))
        code.write(typed(code, code.get(y), TYPES[place]), code.plus(code.field(call, Call.Y), (at, SIZES[place])))

    code.cases(code.field(call, Call.KIND), *(lambda p=p: store(p) for p in range(len(TYPES))))

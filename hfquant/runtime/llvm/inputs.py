"""What a row of x becomes before it is multiplied.

It is divided by the stored factors, if there are any, and laid out in runs of whole blocks, padded with zeros.  For
real products that is all.  For integers every group of runs is rounded as `tensors.activations` defines it: scale
from the extremes, or stored; codes to nearest, ties to even; and written in the order in which the tiles want it.

NaN is carried into the scale, so that it comes out again.
"""

from ...llvm.ir import F32, I8, I32, I64, Code, Value, splat, vector
from ...llvm.numbers import SIZES, TYPES, floats
from .codes import columns
from .records import BLOCK, Call, Inputs

N = 8  # floats handled together
LEAST = 1e-9  # `tensors.activations.LEAST`
ROUND = 1.5 * 2**23  # added to a float below 2²², it leaves the nearest integer in the low bits
FAR = 1 << 20  # beyond every code and zero point
INFINITY = 0x7F800000


def generate(code: Code, order: int, real: bool) -> None:
    """`prepare(call, row, thread)`; order: of columns, of integers"""
    with code.function("prepare", 3, exported=False) as made:
        call, row, thread = made.args
        inputs = code.field(call, Call.INPUTS)
        runs, length = code.field(inputs, Inputs.RUNS), code.field(inputs, Inputs.LENGTH)
        size = code.mul(runs, length)
        room = Call.PREPARED if real else Call.SCRATCH
        x = code.plus(code.field(call, room), (code.mul(row if real else thread, size), 4))
        _lay_out(code, call, inputs, row, x)
        if real:
            _sum_up(code, call, runs, length, row, x)
            return
        with code.loop(code.field(inputs, Inputs.GROUPS)) as group:
            first, last = (
                code.read(I64, code.plus(code.field(inputs, Inputs.FIRST), (group, 8), 8 * i), 8) for i in (0, 1)
            )
            scale, zero = _scale(code, inputs, x, code.mul(first, length), code.mul(last, length))
            with code.loop(last, first) as run:
                _round(code, call, inputs, order, row, run, x, scale, zero)


def _lay_out(code: Code, call: Value, inputs: Value, row: Value, to: Value) -> None:
    """A row of x as float32, divided, run by run, with zeros where a run is shorter than its room."""
    start, divisors = code.field(call, Call.X), code.field(inputs, Inputs.DIVISORS)
    columns_, length = code.field(inputs, Inputs.COLUMNS), code.field(inputs, Inputs.LENGTH)

    def copy(kind: int) -> None:
        source = code.plus(start, (code.mul(row, columns_), SIZES[kind]))
        with code.loop(code.field(inputs, Inputs.RUNS)) as run:
            first, count = (
                code.read(I64, code.plus(code.field(inputs, Inputs.TABLE), (run, 16), 8 * i), 8) for i in (0, 1)
            )
            target = code.plus(to, (code.mul(run, length), 4))
            whole = code.and_(count, code.number(-N))

            def move(i: Value, n: int) -> None:
                at = code.plus(first, i)
                value = code.variable(
                    vector(F32, n), floats(code, TYPES[kind], code.plus(source, (at, SIZES[kind])), n)
                )
                with code.if_then(code.nonzero(divisors), likely=False):
                    by = code.read(vector(F32, n), code.plus(divisors, (at, 4)), 4)
                    code.set(value, code.fdiv(code.get(value), by))
                code.write(code.get(value), code.plus(target, (i, 4)), 4)

            with code.loop(whole, step=N) as i:
                move(i, N)
            with code.loop(count, whole) as i:
                move(i, 1)
            with code.loop(length, count) as i:
                code.write(splat(F32, 1, 0.0), code.plus(target, (i, 4)), 4)

    code.cases(code.field(call, Call.KIND), *(lambda k=k: copy(k) for k in range(len(TYPES))))


def _sum_up(code: Code, call: Value, runs: Value, length: Value, row: Value, x: Value) -> None:
    """−Σ x of every run."""
    kind = vector(F32, N)
    with code.loop(runs) as run:
        total = code.variable(kind, splat(F32, N, 0.0))
        with code.loop(length, step=N) as i:
            at = code.plus(x, (code.plus(i, (run, length)), 4))
            code.set(total, code.fadd(code.get(total), code.read(kind, at, 4)))
        sum = _fold(code, code.get(total), code.fadd)
        code.write(code.fneg(sum), _of(code, call, Call.NEGATIVE, row, run), 4)


def _scale(code: Code, inputs: Value, x: Value, start: Value, end: Value) -> tuple[Value, Value]:
    """Scale (float) and zero point (int32) of x[start:end]."""
    ints, kind = vector(I32, N), vector(F32, N)
    largest = code.variable(ints, splat(I32, N, 0))  # of the magnitudes' bits: they are ordered alike, NaN above all
    low, high = (code.variable(kind, splat(F32, N, 0.0)) for _ in range(2))
    with code.loop(end, start, N) as i:
        value = code.read(kind, code.plus(x, (i, 4)), 4)
        bits = code.and_(code.bitcast(value, ints), splat(I32, N, 0x7FFFFFFF))
        code.set(largest, _larger(code, bits, code.get(largest)))
        code.set(low, _choose(code, "<", value, code.get(low)))
        code.set(high, _choose(code, ">", value, code.get(high)))
    most = _fold(code, code.get(largest), lambda a, b: _larger(code, a, b))
    magnitude = code.bitcast(most, F32)
    least, greatest = (
        _fold(code, code.get(room), lambda a, b, s=sign: _choose(code, s, a, b))
        for room, sign in ((low, "<"), (high, ">"))
    )
    shifted = code.nonzero(code.field(inputs, Inputs.SHIFTED))
    bottom, top = (code.sitofp(code.field(inputs, place), F32) for place in (Inputs.BOTTOM, Inputs.TOP))
    width = code.select(shifted, code.fsub(greatest, least), magnitude)
    found = code.fdiv(width, code.select(shifted, code.fsub(top, bottom), top))
    smallest = F32(LEAST)
    scale = code.variable(F32, code.select(code.fcmp_ordered("<", found, smallest), smallest, found))
    steps = code.sub(
        code.field(inputs, Inputs.BOTTOM), code.sext(_nearest(code, code.fdiv(least, code.get(scale))), I64)
    )
    zero = code.variable(I64, code.select(shifted, _within(code, steps, inputs), code.number(0)))
    static = code.field(inputs, Inputs.STATIC)
    with code.if_then(code.nonzero(static)):
        code.set(scale, code.read(F32, static, 4))
        with code.if_then(shifted):
            stored = code.read(F32, code.field(inputs, Inputs.STATIC_ZERO), 4)
            code.set(zero, code.sext(_nearest(code, stored), I64))
    broken = code.icmp_signed(">", most, I32(INFINITY))
    return code.select(broken, magnitude, code.get(scale)), code.trunc(code.get(zero), I32)


def _round(
    code: Code, call: Value, inputs: Value, order: int, row: Value, run: Value, x: Value, scale: Value, zero: Value
) -> None:
    """A run's codes in the tiles' order, its scale, −Σ (q − u) and −u."""
    length, ints = code.field(inputs, Inputs.LENGTH), vector(I32, N)
    start = code.mul(run, length)
    bottom, top = (code.spread(code.trunc(code.field(inputs, place), I32), N) for place in (Inputs.BOTTOM, Inputs.TOP))
    by, shift = code.spread(scale, N), code.spread(zero, N)
    sums = code.variable(ints, splat(I32, N, 0))
    room = code.plus(code.field(call, Call.PREPARED), start, (row, code.mul(code.field(inputs, Inputs.RUNS), length)))
    with code.loop(length, step=BLOCK) as i:
        parts = []
        for j in range(0, BLOCK, N):
            value = code.read(vector(F32, N), code.plus(x, (code.plus(start, i, j), 4)), 4)
            q = code.add(_nearest(code, code.fdiv(value, by)), shift)
            q = code.select(code.icmp_signed("<", q, bottom), bottom, q)
            q = code.select(code.icmp_signed(">", q, top), top, q)
            code.set(sums, code.add(code.get(sums), q))
            parts.append(q)
        octets = code.trunc(code.join(parts), vector(I8, BLOCK))
        code.write(code.shuffle(octets, columns(order)), code.plus(room, i), 1)
    total = _fold(code, code.get(sums), code.add)
    code.write(scale, _of(code, call, Call.SCALES, row, run), 4)
    negative = code.sub(code.mul(zero, code.trunc(length, I32)), total)
    code.write(negative, _of(code, call, Call.NEGATIVE, row, run), 4)
    with code.if_then(code.nonzero(code.field(call, Call.SHIFTS))):
        code.write(code.neg(zero), _of(code, call, Call.SHIFTS, row, run), 4)


def _nearest(code: Code, value: Value) -> Value:
    """To the nearest integer, ties to even; what is far beyond every code stays there."""
    is_vector = hasattr(value.type, "count")
    n = value.type.count if is_vector else 1

    def number(x: float) -> Value:
        return splat(F32, n, x) if is_vector else F32(x)

    value = _choose(code, "<", value, number(FAR))  # NaN becomes FAR
    value = _choose(code, ">", value, number(-FAR))
    kind = vector(I32, n) if is_vector else I32
    offset = splat(I32, n, _bits(ROUND)) if is_vector else I32(_bits(ROUND))
    return code.sub(code.bitcast(code.fadd(value, number(ROUND)), kind), offset)


def _bits(value: float) -> int:
    import struct

    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _within(code: Code, value: Value, inputs: Value) -> Value:
    bottom, top = code.field(inputs, Inputs.BOTTOM), code.field(inputs, Inputs.TOP)
    value = code.select(code.icmp_signed("<", value, bottom), bottom, value)
    return code.select(code.icmp_signed(">", value, top), top, value)


def _choose(code: Code, sign: str, a: Value, b: Value) -> Value:
    """The smaller or larger; b if a is NaN."""
    return code.select(code.fcmp_ordered(sign, a, b), a, b)


def _larger(code: Code, a: Value, b: Value) -> Value:
    return code.select(code.icmp_signed(">", a, b), a, b)


def _fold(code: Code, value: Value, combine: object) -> Value:
    """All elements of a vector into one."""
    n = value.type.count
    while n > 1:
        n //= 2
        a, b = code.shuffle(value, range(n)), code.shuffle(value, range(n, 2 * n))
        value = combine(a, b)  # type: ignore[operator]
    return code.extract_element(value, I32(0))


def _of(code: Code, call: Value, place: Call, row: Value, run: Value) -> Value:
    """Address in a table of 4-byte numbers [rows, runs]."""
    runs = code.field(code.field(call, Call.INPUTS), Inputs.RUNS)
    return code.plus(code.field(call, place), (code.plus(run, (row, runs)), 4))

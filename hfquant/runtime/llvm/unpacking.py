"""Bit streams and planes into codes, and codes into numbers: what `tensors.packing` and `reference.dense` define."""

from enum import IntEnum

from ...llvm.ir import F32, I8, I16, I32, I64, Code, Value, splat, vector
from ...llvm.numbers import SIZES, TYPES, floats, typed
from .records import BLOCK

N = BLOCK // 4  # int32 words of four codes


class Unpack(IntEnum):
    """What `unpack` is told."""

    WORDS = 0  # the streams of each row, one plane after the other
    ROW = 1  # bytes of a row
    ROWS = 2
    COUNT = 3  # codes of a row
    CODES = 4  # uint8 [rows, count]
    OFFSETS = 5  # int64 [planes]: where each begins in a row, in bytes


class Decode(IntEnum):
    """What `decode` is told: W = s·(c − z)."""

    CODES = 0  # uint8 [rows, columns]
    ROWS = 1
    COLUMNS = 2
    GROUP = 3
    GROUPS = 4
    SCALES = 5  # [rows, groups], of the type it was compiled for
    ZEROS = 6  # uint8 [rows, groups]; 0: all are MIDDLE
    MIDDLE = 7
    KIND = 8  # of the result
    DENSE = 9


def unpacker(code: Code, widths: tuple[int, ...]) -> None:
    """`unpack(record)`: planes of these widths, the low one first"""
    with code.function("unpack", 1) as made:
        (record,) = made.args
        row_bytes, count = code.field(record, Unpack.ROW), code.field(record, Unpack.COUNT)
        whole = code.sdiv(code.plus(count, -1), code.number(BLOCK))  # the last block is read with care
        with code.loop(code.field(record, Unpack.ROWS)) as row:
            words = code.plus(code.field(record, Unpack.WORDS), (row, row_bytes))
            to = code.plus(code.field(record, Unpack.CODES), (row, count))
            starts = [code.plus(words, _offset(code, record, i)) for i in range(len(widths))]
            with code.loop(whole) as i:
                codes = _codes(code, widths, [code.plus(s, (i, 4 * w)) for s, w in zip(starts, widths, strict=True)])
                code.write(codes, code.plus(to, (i, BLOCK)))
            at = code.mul(whole, code.number(BLOCK))
            parts = []
            for i, width in enumerate(widths):
                start = code.plus(starts[i], (whole, 4 * width))
                room = code.room(2 * BLOCK)
                with code.loop(code.least(code.number(4 * width), code.sub(code.plus(words, row_bytes), start))) as j:
                    code.write(code.read(I8, code.plus(start, j)), code.plus(room, j))
                parts.append(room)
            last = code.room(BLOCK)
            code.write(_codes(code, widths, parts), last)
            with code.loop(code.sub(count, at)) as j:
                code.write(code.read(I8, code.plus(last, j)), code.plus(to, at, j))


def _offset(code: Code, record: Value, plane: int) -> Value:
    return code.read(I64, code.plus(code.field(record, Unpack.OFFSETS), 8 * plane), 8)


def _codes(code: Code, widths: tuple[int, ...], starts: list[Value]) -> Value:
    """32 codes: their fields of every plane, put together."""
    found, shift = None, 0
    for width, start in zip(widths, starts, strict=True):
        part = _fields(code, width, start)
        part = code.shl(part, splat(I32, N, shift)) if shift else part
        found = part if found is None else code.or_(found, part)
        shift += width
    return code.bitcast(found, vector(I8, BLOCK))


def _fields(code: Code, width: int, start: Value) -> Value:
    """32 fields of a stream, one in each byte of 8 words."""
    if width == 8:
        return code.read(vector(I32, N), start)
    if width == 4:
        words = code.zext(code.read(vector(I16, N), start), vector(I32, N))
    elif width == 2:
        words = code.zext(code.read(vector(I8, N), start), vector(I32, N))
    else:  # four of them begin on a byte or in its middle
        words = splat(I32, N, 0)
        for i in range(N):
            byte, bit = divmod(4 * width * i, 8)
            word = code.read(I32, code.plus(start, byte))
            word = code.lshr(word, I32(bit)) if bit else word
            words = code.insert_element(words, word, I32(i))
    found = None
    for k in range(4):
        part = code.shl(words, splat(I32, N, k * (8 - width))) if k else words
        part = code.and_(part, splat(I32, N, (2**width - 1) << 8 * k))
        found = part if found is None else code.or_(found, part)
    return found


def decoder(code: Code, scale: str) -> None:
    """`decode(record)`"""
    with code.function("decode", 1) as made:
        (record,) = made.args
        columns, group, groups = (code.field(record, p) for p in (Decode.COLUMNS, Decode.GROUP, Decode.GROUPS))
        zeros = code.field(record, Decode.ZEROS)
        with code.loop(code.field(record, Decode.ROWS)) as row, code.loop(groups) as g:
            place = code.plus(g, (row, groups))
            at = code.plus(code.field(record, Decode.SCALES), (place, 4 if scale == "float32" else 2))
            s = code.extract_element(floats(code, scale, at, 1), I32(0))
            zero = code.variable(I32, code.trunc(code.field(record, Decode.MIDDLE), I32))
            with code.if_then(code.nonzero(zeros)):
                code.set(zero, code.zext(code.read(I8, code.plus(zeros, place)), I32))
            z, first = code.sitofp(code.get(zero), F32), code.mul(g, group)
            end = code.least(code.plus(first, group), columns)
            whole = code.plus(first, (code.sdiv(code.sub(end, first), code.number(N)), N))
            with code.loop(whole, first, N) as i:
                _decode(code, record, code.plus(i, (row, columns)), s, z, N)
            with code.loop(end, whole) as i:
                _decode(code, record, code.plus(i, (row, columns)), s, z, 1)


def _decode(code: Code, record: Value, at: Value, s: Value, z: Value, n: int) -> None:
    codes = code.read(vector(I8, n), code.plus(code.field(record, Decode.CODES), at))
    value = code.uitofp(codes, vector(F32, n))
    value = code.fmul(code.fsub(value, code.spread(z, n)), code.spread(s, n))
    to = code.field(record, Decode.DENSE)

    def store(kind: int) -> None:
        code.write(typed(code, value, TYPES[kind]), code.plus(to, (at, SIZES[kind])))

    code.cases(code.field(record, Decode.KIND), *(lambda k=k: store(k) for k in range(len(TYPES))))

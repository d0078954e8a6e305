"""Codes, one in a byte, into tiles."""

from enum import IntEnum

from ...llvm.ir import I8, I32, I64, Code, Value, splat, vector
from .codes import CHUNKS, Tile, columns
from .records import BLOCK, ROWS, Inputs

N = 8  # rows transposed together, and chunks in a block


class Pack(IntEnum):
    """What `pack` is told."""

    CODES = 0  # uint8 [out, columns]
    OUT = 1
    INPUTS = 2
    TILES = 3  # where they go
    FIRST = 4  # the first tile, and the one after the last
    LAST = 5


def generate(code: Code, tile: Tile) -> None:
    """`pack(record)`"""
    with code.function("pack", 1) as made:
        (record,) = made.args
        inputs = code.field(record, Pack.INPUTS)
        runs, length = code.field(inputs, Inputs.RUNS), code.field(inputs, Inputs.LENGTH)
        row_length, out = code.field(inputs, Inputs.COLUMNS), code.field(record, Pack.OUT)
        blocks = code.sdiv(length, code.number(BLOCK))
        room = code.room(ROWS * BLOCK)
        with code.loop(code.field(record, Pack.LAST), code.field(record, Pack.FIRST)) as at, code.loop(runs) as run:
            first, count = (
                code.read(I64, code.plus(code.field(inputs, Inputs.TABLE), (run, 16), 8 * i), 8) for i in (0, 1)
            )
            with code.loop(blocks) as i:
                with code.loop(code.number(ROWS)) as r:
                    row = code.plus(r, (at, ROWS))
                    start = code.plus(code.field(record, Pack.CODES), first, (row, row_length), (i, BLOCK))
                    left = code.select(code.icmp_signed("<", row, out), code.plus(count, (i, -BLOCK)), code.number(0))
                    _fetch(code, tile, start, left, code.plus(room, (r, BLOCK)))
                place = code.plus(i, (code.plus(run, (at, runs)), blocks))
                _store(code, tile, room, code.plus(code.field(record, Pack.TILES), (place, 64 * tile.bits)))


def _fetch(code: Code, tile: Tile, start: Value, left: Value, room: Value) -> None:
    """The codes of a row in a block, those that there are, in the order of chunks."""
    kind = vector(I8, BLOCK)
    with code.if_else(code.icmp_signed(">=", left, code.number(BLOCK))) as (whole, some):
        with whole:
            code.write(code.shuffle(code.read(kind, start), columns(tile.order)), room, BLOCK)
        with some:
            part = code.room(BLOCK)
            code.write(splat(I8, BLOCK, 0), part, BLOCK)
            with code.loop(left) as i:
                code.write(code.read(I8, code.plus(start, i)), code.plus(part, i))
            code.write(code.shuffle(code.read(kind, part), columns(tile.order)), room, BLOCK)


def _store(code: Code, tile: Tile, room: Value, to: Value) -> None:
    """A block's lines."""
    for half in range(0, ROWS, N):
        rows = [code.read(vector(I32, N), code.plus(room, (half + r) * BLOCK), BLOCK) for r in range(N)]
        chunks = _transposed(code, rows)
        shift = line = 0
        for width in tile.planes:
            per = 8 // width
            for start in range(0, CHUNKS, per):
                found = None
                for field in range(per):
                    part = _field(code, chunks[start + field], shift, width, width * field)
                    found = part if found is None else code.or_(found, part)
                code.write(found, code.plus(to, 64 * line + 4 * half), 4 * N)
                line += 1
            shift += width


def _field(code: Code, codes: Value, shift: int, width: int, to: int) -> Value:
    """Bits shift .. shift + width of every byte, moved to bit `to`."""
    if width == 8:
        return codes
    mask = (2**width - 1 << shift) * 0x01010101
    found, left = code.and_(codes, splat(I32, N, mask)), to - shift
    if not left:
        return found
    return code.shl(found, splat(I32, N, left)) if left > 0 else code.lshr(found, splat(I32, N, -left))


def _transposed(code: Code, rows: list[Value]) -> list[Value]:
    """8 vectors of 8."""
    step = 1
    while step < N:
        made = list(rows)
        for i in range(N):
            if i & step:
                continue
            a, b = rows[i], rows[i + step]
            low = [k if not k & step else N + k - step for k in range(N)]
            high = [k + step if not k & step else N + k for k in range(N)]
            made[i], made[i + step] = code.shuffle(a, low, b), code.shuffle(a, high, b)
        rows, step = made, 2 * step
    return rows

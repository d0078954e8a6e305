"""Bit planes to codes, in registers: where every code of a block stands, and how it is got."""

from dataclasses import dataclass
from functools import cache

from ...llvm.ir import I8, I32, Code, Type, Value, splat, vector
from ...llvm.numbers import floats
from .records import BLOCK

CHUNKS = BLOCK // 4
# Widths whose codes are split, and how.  A whole byte needs no splitting.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Tile:
    """What the code of a tile depends on.

    real: x comes as it is, in float32; otherwise as int8.  zeros: every scale has a zero point, otherwise it is the
    middle code.  sums: x has zero points too.  scale: the type of the stored scales, by torch's name.
    """

    bits: int
    scale: str
    zeros: bool = False
    sums: bool = False
    real: bool = False

    @property
    def planes(self) -> tuple[int, ...]:
        return PLANES[self.bits]

    @property
    def order(self) -> int:
        """The width of the widest plane, which decides on the order of columns."""
        return self.planes[0]


def column(order: int, chunk: int, k: int) -> int:
    """The column within a block that stands in byte k of a lane in a chunk.

    The bit fields of 32-bit words of a stream, `packing.pack_stream` with `order` bits, from the lowest on.
    """
    per = 8 // order
    line, field = divmod(chunk, per)
    return (line * 4 + k) * per + field


@cache
def columns(order: int) -> tuple[int, ...]:
    """The columns of a block in the order of chunks and bytes: how x is laid out."""
    return tuple(column(order, chunk, k) for chunk in range(CHUNKS) for k in range(4))


def chunk(code: Code, tile: Tile, lines: list[Value], c: int) -> Value:
    """The codes of chunk c, one in every byte.  lines: int32 vectors, one for each bit of a code"""
    n = lines[0].type.count
    found, shift, first = None, 0, 0
    for width in tile.planes:
        per = 8 // width
        line, right = lines[first + c // per], c % per * width - shift
        if right:
            amount = splat(I32, n, abs(right))
            line = code.lshr(line, amount) if right > 0 else code.shl(line, amount)
        if width < 8:
            line = code.and_(line, splat(I32, n, _bytes(2**width - 1 << shift)))
        found = line if found is None else code.or_(found, line)
        shift, first = shift + width, first + width
    return found


def nibbles(code: Code, line: Value) -> list[Value]:
    """Low and high half of every byte."""
    n = line.type.count
    mask, high = splat(I32, n, _bytes(15)), code.lshr(line, splat(I32, n, 4))
    return [code.and_(line, mask), code.and_(high, mask)]


def _bytes(value: int) -> int:
    return value * 0x01010101


def scales(code: Code, tile: Tile, address: Value, n: int) -> Value:
    """n stored scales as float32."""
    return floats(code, tile.scale, address, n)


def octets(n: int) -> Type:
    """A register of bytes."""
    return vector(I8, n)

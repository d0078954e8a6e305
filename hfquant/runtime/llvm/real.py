"""A tile with x as it is: codes become float32, products are summed in float32."""

from ...llvm.ir import F32, I32, Code, Value, splat, vector
from .codes import CHUNKS, Tile, chunk, column


class Real:
    """See `product.Arithmetic`."""

    kind = F32
    size = 4
    together: tuple[int, ...] = (4, 1)

    def __init__(self, code: Code, tile: Tile) -> None:
        self.code, self.tile, self.n, self.width = code, tile, code.level.lanes, code.level.vector

    def run(self, sum: Value, scale: Value, total: Value) -> Value:
        return self.code.fadd(total, sum)

    def block(self, lines: Value, xs: list[Value], sums: list[list[Value]]) -> None:
        code, n = self.code, self.n
        for h in range(len(sums[0])):
            found = [code.get(row[h]) for row in sums]
            loaded = [
                code.read(vector(I32, n), code.plus(lines, 64 * line + self.width * h), self.width)
                for line in range(self.tile.bits)
            ]
            for c in range(CHUNKS):
                codes = chunk(code, self.tile, loaded, c)
                for k in range(4):
                    one = code.lshr(codes, splat(I32, n, 8 * k)) if k else codes
                    one = code.sitofp(code.and_(one, splat(I32, n, 255)), vector(F32, n))
                    place = 4 * column(self.tile.order, c, k)
                    for row, x in enumerate(xs):
                        value = code.spread(code.read(F32, code.plus(x, place), 4), n)
                        found[row] = code.fma(one, value, found[row])
                found = code.fence(found)
            for rooms, value in zip(sums, found, strict=True):
                code.set(rooms[h], value)

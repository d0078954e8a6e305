"""The integers of a tile: unsigned codes times int8, exact in int32.

`vnni` has an instruction for 4 products and their sum.  Without it products are summed in pairs to 16 bits, which holds
a few of them before it would overflow, and then to 32.
"""

from ...llvm.ir import F32, I8, I16, I32, Code, Value, splat, vector
from .codes import CHUNKS, Tile, chunk, nibbles

# Chunks whose products, 2·128·(2ᵇ − 1) at most, can be summed in 16 bits.  A whole byte is multiplied in two halves.
SUMMED = {2: 8, 3: 8, 4: 8, 5: 4, 6: 2, 7: 1, 8: 8}
TOGETHER = {"madd": (4, 2, 1), "vnni": (8, 4, 2, 1), "emulated": (8, 4, 2, 1)}


class Integer:
    """See `product.Arithmetic`."""

    kind = I32
    size = 1

    def __init__(self, code: Code, tile: Tile) -> None:
        self.code, self.tile, self.level = code, tile, code.level
        self.together: tuple[int, ...] = TOGETHER[self.level.dot]
        self.n, self.size_of_vector = self.level.lanes, self.level.vector

    def run(self, sum: Value, scale: Value, total: Value) -> Value:
        code, n = self.code, self.n
        return code.fma(code.sitofp(sum, vector(F32, n)), code.spread(code.read(F32, scale, 4), n), total)

    def block(self, lines: Value, xs: list[Value], sums: list[list[Value]]) -> None:
        parts = list(range(len(sums[0])))
        # registers: the two halves of a byte, or too many accumulators, are a part of the rows at a time
        alone = self.level.dot == "madd" and self.tile.bits >= 7
        for chosen in [[h] for h in parts] if alone else [parts]:
            step = self._madd if self.level.dot == "madd" else self._vnni
            step({h: self._lines(lines, h) for h in chosen}, xs, sums)

    def _lines(self, lines: Value, part: int) -> list[Value]:
        width = self.size_of_vector
        return [
            self.code.read(vector(I32, self.n), self.code.plus(lines, 64 * line + width * part), width)
            for line in range(self.tile.bits)
        ]

    def _x(self, x: Value, c: int) -> Value:
        """4 columns of x in every lane."""
        four = self.code.spread(self.code.read(I32, self.code.plus(x, 4 * c), 4), self.n)
        return self.code.bitcast(four, self._bytes)

    @property
    def _bytes(self) -> Value:
        return vector(I8, self.size_of_vector)

    def _vnni(self, lines: dict[int, list[Value]], xs: list[Value], sums: list[list[Value]]) -> None:
        code = self.code
        found = {(k, h): code.get(sums[k][h]) for k in range(len(xs)) for h in lines}
        for c in range(CHUNKS):
            codes = {h: chunk(code, self.tile, lines[h], c) for h in lines}
            for k, x in enumerate(xs):
                for h in lines:
                    found[k, h] = self._dot(found[k, h], codes[h], self._x(x, c))
        for (k, h), value in found.items():
            code.set(sums[k][h], value)

    def _dot(self, sum: Value, codes: Value, x: Value) -> Value:
        """sum + Σ of 4 products, in every lane."""
        code, n, kind = self.code, self.n, vector(I32, self.n)
        if self.level.dot == "vnni":
            name = f"llvm.x86.avx512.vpdpbusd.{8 * self.size_of_vector}"
            return code.intrinsic(name, kind, sum, code.bitcast(codes, self._bytes), x)
        x = code.bitcast(x, kind)
        for k in range(4):
            c = code.and_(code.lshr(codes, splat(I32, n, 8 * k)), splat(I32, n, 255))
            q = code.ashr(code.shl(x, splat(I32, n, 24 - 8 * k)), splat(I32, n, 24))
            sum = code.add(sum, code.mul(c, q))
        return sum

    def _madd(self, lines: dict[int, list[Value]], xs: list[Value], sums: list[list[Value]]) -> None:
        code = self.code
        shorts: dict[tuple[int, int, int], Value] = {}
        for c in range(CHUNKS):
            codes = {h: self._halves(lines[h], c) for h in lines}
            for k, x in enumerate(xs):
                four = self._x(x, c)
                for h in lines:
                    for half, value in enumerate(codes[h]):
                        self._add(shorts, (k, h, half), value, four)
            if (c + 1) % SUMMED[self.tile.bits]:
                shorts = dict(zip(shorts, code.fence(list(shorts.values())), strict=True))
            else:
                self._widen(shorts, sums)
                shorts = {}

    def _halves(self, lines: list[Value], c: int) -> list[Value]:
        """Codes that fit into 7 bits: a whole byte as two."""
        return nibbles(self.code, lines[c]) if self.tile.bits == 8 else [chunk(self.code, self.tile, lines, c)]

    def _add(
        self, shorts: dict[tuple[int, int, int], Value], key: tuple[int, int, int], codes: Value, x: Value
    ) -> None:
        kind = vector(I16, 2 * self.n)
        pairs = self.code.intrinsic("llvm.x86.avx2.pmadd.ub.sw", kind, self.code.bitcast(codes, self._bytes), x)
        shorts[key] = self.code.add(shorts[key], pairs) if key in shorts else pairs

    def _widen(self, shorts: dict[tuple[int, int, int], Value], sums: list[list[Value]]) -> None:
        """16 bits to 32; the high half of a byte counts 16 times."""
        code = self.code
        for (k, h, half), value in shorts.items():
            factor = splat(I16, 2 * self.n, 16 if half else 1)
            wide = code.intrinsic("llvm.x86.avx2.pmadd.wd", vector(I32, self.n), value, factor)
            code.set(sums[k][h], code.add(code.get(sums[k][h]), wide))

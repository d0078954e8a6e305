"""A pass of coordinate descent over all columns, `_refine.descend`, in generated code.

    g = H_b d for a block b of columns; then, one column j after the other: c' = round(c − g_j/(H_jj·s)),
    m = s·(c' − c), d_j += m, and g_i += H_ji·m for the columns i > j of the block

The rows of the weight are independent: those of a tile go through all blocks while their d stays in the second cache
and a block's g in the first.  Beside it f = dᵀHd is kept up: with L for the columns before the block,
Σ over blocks of d_bᵀ (2 H_bL d_L + H_bb d_b), and of every move m (2 (g_j − H_jR d_R) + m H_jj), R for those after.
"""

from enum import IntEnum

import torch
from torch import Tensor

from ..llvm.ir import F32, I8, Code, Value, splat, vector
from ..llvm.strips import (
    FIRST,
    FLOATS,
    LINE,
    Loop,
    N,
    Tile,
    clamp,
    constant,
    floats,
    nearest,
    repeat,
    scalar,
    some,
    tiled,
    untiled,
)  # fmt: skip

MOST = 128  # columns in a block: they are held on the stack


class Descent(IntEnum):
    """What the loop is told.  Tiles are float32 [tiles, in, width] if nothing else is said."""

    D = FIRST
    CODES = FIRST + 1
    SCALES = FIRST + 2  # [tiles, groups, width]
    PRUNED = FIRST + 3  # bool; 0: none
    VALUE = FIRST + 4  # [tiles, width]
    H = FIRST + 5
    ROW = FIRST + 6  # elements of a row of H
    IN = FIRST + 7
    BLOCK = FIRST + 8
    GROUP = FIRST + 9  # columns of a group
    GROUPS = FIRST + 10
    TOP = FIRST + 11


def descend(
    codes: Tensor, S: Tensor, D: Tensor, H: Tensor, group: int, top: int, block: int, pruned: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The new codes [in, out], and f of every row [out].

    codes, D float32 [in, out]; S [groups, out], each row for `group` columns; H [in, in] contiguous; pruned bool
    [in, out]: codes that stay.  None if the code could not be made.
    """
    n, out = codes.shape
    found, scales, moved = tiled(codes), tiled(S, 1.0), tiled(D)
    held = None if pruned is None else tiled(pruned)
    value = torch.empty(found.shape[0], 1, found.shape[2], dtype=torch.float32, device="cpu")
    record: dict[IntEnum, Tensor | int] = {
        Descent.D: moved, Descent.CODES: found, Descent.SCALES: scales, Descent.PRUNED: 0 if held is None else held,
        Descent.VALUE: value, Descent.H: H, Descent.ROW: H.stride(0), Descent.IN: n, Descent.BLOCK: min(block, MOST),
        Descent.GROUP: group, Descent.GROUPS: S.shape[0], Descent.TOP: top,
    }  # fmt: skip
    if not DESCENT(found.shape[0], record):
        return None
    return untiled(found, out), untiled(value, out)[0]


class _Pass:
    """The code of one tile's pass."""

    def __init__(self, code: Code, record: Value, at: Value) -> None:
        self.code, self.tile = code, Tile(code)
        self.n, self.H, self.row = (code.field(record, p) for p in (Descent.IN, Descent.H, Descent.ROW))
        self.group, self.block = (code.field(record, p) for p in (Descent.GROUP, Descent.BLOCK))
        self.top = code.spread(code.sitofp(code.field(record, Descent.TOP), F32), N)
        line, lines = self.tile.line, code.mul(at, self.n)
        self.d, self.codes = (code.plus(code.field(record, p), (lines, line)) for p in (Descent.D, Descent.CODES))
        self.scales = code.plus(
            code.field(record, Descent.SCALES), (code.mul(at, code.field(record, Descent.GROUPS)), line)
        )
        self.pruned, self.flags = code.field(record, Descent.PRUNED), code.mul(lines, code.number(line // 4))
        self.g, self.later = (code.room(MOST * line) for _ in range(2))
        self.value = code.plus(code.field(record, Descent.VALUE), (at, line))

    def run(self) -> None:
        code, tile = self.code, self.tile
        for s in tile.strips:
            tile.write(constant(0.0), self.value, code.number(0), s)
        count = code.sdiv(code.plus(self.n, self.block, -1), self.block)
        with code.loop(count) as i:
            a = code.mul(i, self.block)
            b = code.least(code.add(a, self.block), self.n)
            tile.few(a, b, lambda k, count: self._gradient(k, count, a, b))
            with code.loop(code.number(len(tile.strips))) as s:
                strip = code.mul(s, code.number(LINE))
                total = code.variable(FLOATS)
                code.set(total, floats(code, code.plus(self.value, strip)))
                with code.loop(b, a) as j:
                    self._move(j, a, b, strip, total)
                code.write(code.get(total), code.plus(self.value, strip), 4)

    def _gradient(self, k: Value, count: int, a: Value, b: Value) -> None:
        """g of the columns k .. k + count, and the part of it that columns behind b have."""
        code, tile, zero = self.code, self.tile, self.code.number(0)
        sums, ks = tile.sums(count), [code.plus(k, i) for i in range(count)]
        lines = [code.plus(self.H, (code.mul(i, self.row), 4)) for i in ks]
        places = [code.sub(i, a) for i in ks]
        tile.add(sums, lines, self.d, zero, a)
        for rooms, place in zip(sums, places, strict=True):
            for s in tile.strips:
                tile.write(code.get(rooms[s]), self.g, place, s)
        tile.add(sums, lines, self.d, a, b)
        for rooms, place, i in zip(sums, places, ks, strict=True):
            for s in tile.strips:  # the sum so far is H_bL d_L + H_bb d_b
                both = code.fadd(code.get(rooms[s]), tile.read(self.g, place, s))
                f = code.fma(both, tile.read(self.d, i, s), tile.read(self.value, zero, s))
                tile.write(f, self.value, zero, s)
                tile.write(code.get(rooms[s]), self.later, place, s)
        tile.add(sums, lines, self.d, b, self.n)
        for rooms, place in zip(sums, places, strict=True):
            for s in tile.strips:
                g = code.get(rooms[s])
                tile.write(g, self.g, place, s)
                tile.write(code.fsub(g, tile.read(self.later, place, s)), self.later, place, s)

    def _move(self, j: Value, a: Value, b: Value, strip: Value, total: Value) -> None:
        code, line = self.code, self.tile.line
        diagonal = code.plus(self.H, (code.mul(j, self.row), 4), (j, 4))
        h, place = scalar(code, diagonal), code.mul(code.sub(j, a), code.number(line))
        s = floats(code, code.plus(self.scales, strip, (code.sdiv(j, self.group), line)))
        here, d = (code.plus(t, strip, (j, line)) for t in (self.codes, self.d))
        old, g = floats(code, here), floats(code, code.plus(self.g, strip, place))
        step = code.fdiv(code.fdiv(g, h), s)
        found = clamp(code, nearest(code, code.fsub(old, step)), constant(0.0), self.top)
        new = code.variable(FLOATS)
        code.set(new, found)
        with code.if_then(code.nonzero(self.pruned)):
            flags = code.plus(self.pruned, self.flags, code.sdiv(strip, code.number(4)), (j, line // 4))
            stays = code.icmp_signed("!=", code.read(vector(I8, N), flags), splat(I8, N, 0))
            code.set(new, code.select(stays, old, code.get(new)))
        with code.if_then(some(code, code.fcmp_unordered("!=", code.get(new), old))):  # most stay where they are
            moved = code.fmul(code.fsub(code.get(new), old), s)
            code.write(code.get(new), here, 4)
            code.write(code.fadd(floats(code, d), moved), d, 4)
            inner = code.fsub(g, floats(code, code.plus(self.later, strip, place)))
            change = code.fma(moved, h, code.fadd(inner, inner))
            code.set(total, code.fma(moved, change, code.get(total)))

            def follow(i: Value) -> None:
                to = code.plus(self.g, strip, (code.sub(i, a), line))
                by = scalar(code, code.plus(diagonal, (code.sub(i, j), 4)))
                code.write(code.fma(by, moved, floats(code, to)), to, 4)

            repeat(code, b, code.plus(j, 1), follow)


DESCENT = Loop("descent", lambda code, record, at: _Pass(code, record, at).run())

"""A_gh = v_gᵀ H_gh v_h of every row and pair of groups, `_refine.products`, in generated code.

All of it would be one product by H and two passes over its result for every group; here a few rows of H at a time stay
in registers until they are summed up.
"""

from enum import IntEnum

import torch
from torch import Tensor

from ..llvm import machine
from ..llvm.ir import Code, Value
from ..llvm.strips import FIRST, FLOATS, LINE, Loop, N, constant, floats, padded, scalar

TOGETHER = 4  # rows of H


class Products(IntEnum):
    """What the loop is told."""

    V = FIRST  # float32 [tiles, in, width]
    H = FIRST + 1
    ROW = FIRST + 2  # elements of a row of H
    IN = FIRST + 3
    COLUMNS = FIRST + 4  # of a group
    GROUPS = FIRST + 5
    A = FIRST + 6  # float32 [tiles, groups, groups, width], zeros


def products(V: Tensor, H: Tensor, columns: int) -> Tensor | None:
    """The lower triangles [rows, groups, groups], zeros above.  V float32 [in, rows]; H [in, in] contiguous, symmetric.

    None if the code could not be made.
    """
    n, rows = V.shape
    groups, width = -(-n // columns), N * _strips()
    tiles = -(-rows // width)
    held = padded(V, width=width).view(n, tiles, width).transpose(0, 1).contiguous()
    A = torch.zeros(tiles, groups, groups, width, dtype=torch.float32, device="cpu")
    record: dict[IntEnum, Tensor | int] = {
        Products.V: held, Products.H: H, Products.ROW: H.stride(0), Products.IN: n, Products.COLUMNS: columns,
        Products.GROUPS: groups, Products.A: A,
    }  # fmt: skip
    if not PRODUCTS(tiles, record):
        return None
    return A.permute(0, 3, 1, 2).reshape(tiles * width, groups, groups)[:rows]


def _strips() -> int:
    """Strips that are multiplied together: as many as fit into the registers."""
    level = machine.level()
    return 4 if level is not None and level.vector == LINE else 1


def _products(code: Code, record: Value, tile: Value) -> None:
    n, columns, groups = (code.field(record, p) for p in (Products.IN, Products.COLUMNS, Products.GROUPS))
    width = code.number(LINE * _strips())
    V = code.plus(code.field(record, Products.V), (code.mul(tile, n), width))
    A = code.plus(code.field(record, Products.A), (code.mul(code.mul(tile, groups), groups), width))
    with code.loop(groups) as g:
        start = code.mul(g, columns)
        end = code.least(code.plus(start, columns), n)
        whole = code.plus(start, (code.sdiv(code.sub(end, start), code.number(TOGETHER)), TOGETHER))
        for count, first, last in ((TOGETHER, start, whole), (1, whole, end)):
            with code.loop(last, first, count) as k, code.loop(code.plus(g, 1)) as h:
                left = code.mul(h, columns)
                right = code.least(code.plus(left, columns), n)
                _add(code, record, V, k, count, left, right, code.plus(A, (code.plus(h, (g, groups)), width)))


def _add(code: Code, record: Value, V: Value, k: Value, count: int, left: Value, right: Value, to: Value) -> None:
    """Σ v_i H_ij v_j over `count` rows i from k on, and the columns left <= j < right."""
    H, row, strips = code.field(record, Products.H), code.field(record, Products.ROW), range(_strips())
    width = code.number(LINE * len(strips))
    sums = [[code.variable(FLOATS) for _ in strips] for _ in range(count)]
    for rooms in sums:
        for room in rooms:
            code.set(room, constant(0.0))
    lines = [code.plus(H, (code.mul(code.plus(k, i), row), 4)) for i in range(count)]
    with code.loop(right, left) as j:
        v = [floats(code, code.plus(V, (j, width), LINE * s)) for s in strips]
        for rooms, line in zip(sums, lines, strict=True):
            by = scalar(code, code.plus(line, (j, 4)))
            for room, value in zip(rooms, v, strict=True):
                code.set(room, code.fma(by, value, code.get(room)))
    for s in strips:
        place = code.plus(to, LINE * s)
        total = floats(code, place)
        for i, rooms in enumerate(sums):
            total = code.fma(floats(code, code.plus(V, (code.plus(k, i), width), LINE * s)), code.get(rooms[s]), total)
        code.write(total, place, 4)


PRODUCTS = Loop("products of groups", _products)

"""A_gh = v_gᵀ H_gh v_h of every row and pair of groups, `_refine.products`, in generated code.

All of it would be one product by H and two passes over its result for every group; here a few rows of H at a time stay
in registers until they are summed up.
"""

from enum import IntEnum

import torch
from torch import Tensor

from ..llvm.ir import Code, Value
from ..llvm.strips import FIRST, Loop, Tile, tiled


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
    groups, held = -(-n // columns), tiled(V)
    tiles, _, width = held.shape
    A = torch.zeros(tiles, groups, groups, width, dtype=torch.float32, device="cpu")
    record: dict[IntEnum, Tensor | int] = {
        Products.V: held, Products.H: H, Products.ROW: H.stride(0), Products.IN: n, Products.COLUMNS: columns,
        Products.GROUPS: groups, Products.A: A,
    }  # fmt: skip
    if not PRODUCTS(tiles, record):
        return None
    return A.permute(0, 3, 1, 2).reshape(tiles * width, groups, groups)[:rows]


def _products(code: Code, record: Value, at: Value) -> None:
    n, columns, groups, H, row = (
        code.field(record, p) for p in (Products.IN, Products.COLUMNS, Products.GROUPS, Products.H, Products.ROW)
    )
    tile = Tile(code)
    V = code.plus(code.field(record, Products.V), (code.mul(at, n), tile.line))
    A = code.plus(code.field(record, Products.A), (code.mul(code.mul(at, groups), groups), tile.line))
    with code.loop(groups) as g:
        start = code.mul(g, columns)

        def add(k: Value, count: int, g: Value = g) -> None:
            lines = [code.plus(H, (code.mul(code.plus(k, i), row), 4)) for i in range(count)]
            with code.loop(code.plus(g, 1)) as h:
                sums, left = tile.sums(count), code.mul(h, columns)
                tile.add(sums, lines, V, left, code.least(code.plus(left, columns), n))
                to = code.plus(h, (g, groups))
                for s in tile.strips:
                    total = tile.read(A, to, s)
                    for i, rooms in enumerate(sums):
                        total = code.fma(tile.read(V, code.plus(k, i), s), code.get(rooms[s]), total)
                    tile.write(total, A, to, s)

        tile.few(start, code.least(code.plus(start, columns), n), add)


PRODUCTS = Loop("products of groups", _products)

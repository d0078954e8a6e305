"""The columns of one block, one after the other, in generated code: where `_obs.sweep` on fixed grids spends its time.

    c = round(w/s + z), e = (w − s·(c − z)) / U_jj, then w_i −= U_ji·e for the columns i > j of the block

All matrices are [in, out] and 16 rows of the weight are the lanes of a vector.  The operations and their order are
those of the torch code that calls this, so the codes are the same; a block's numbers stay in the first cache.
"""

from enum import IntEnum

import torch
from torch import Tensor

from ..llvm.ir import F32, I8, I32, I64, Code, Value, splat, vector
from ..llvm.strips import FIRST, LINE, Loop, N, clamp, constant, floats, nearest, padded, repeat, scalar

MOST = 256  # columns in a block: they are held on the stack


class Round(IntEnum):
    """What `round_block` is told."""

    W = FIRST  # float32 [block, out]
    OUT = FIRST + 1  # of all matrices
    U = FIRST + 2  # the block's corner of it
    ROW = FIRST + 3  # elements of a row of U
    COLUMNS = FIRST + 4
    GROUPS = FIRST + 5  # int64 [block]
    SCALES = FIRST + 6  # float32 [groups, out]
    ZEROS = FIRST + 7
    KEEP = FIRST + 8  # bool [block, out]; 0: all
    TOP = FIRST + 9
    CODES = FIRST + 10  # uint8 [block, out]
    ERRORS = FIRST + 11  # float32 [block, out]


def round_block(
    W: Tensor, U: Tensor, groups: Tensor, S: Tensor, Z: Tensor, top: int, keep: Tensor | None, codes: Tensor
) -> Tensor | None:
    """The columns of a block, W [block, out], are rounded to `codes` uint8 [block, out].

    U [block, ...]: contiguous rows that begin on the diagonal.  groups int64 [block]: which rows of S and Z
    [groups, out] are a column's.  Returns what `sweep` calls E, [block, out]; None if the code could not be made.
    """
    if U.stride(1) != 1:
        raise ValueError("the rows of U are not contiguous")
    columns, out = W.shape
    W, S, Z, found = padded(W), padded(S, 1.0), padded(Z), padded(codes)
    keep = None if keep is None else padded(keep)
    E = torch.empty_like(W)
    record: dict[IntEnum, Tensor | int] = {
        Round.W: W, Round.OUT: W.shape[1], Round.U: U, Round.ROW: U.stride(0), Round.COLUMNS: columns,
        Round.GROUPS: groups, Round.SCALES: S, Round.ZEROS: Z, Round.KEEP: 0 if keep is None else keep,
        Round.TOP: top, Round.CODES: found, Round.ERRORS: E,
    }  # fmt: skip
    if not ROUND(W.shape[1] // N, record):
        return None
    if found is not codes:
        codes.copy_(found[:, :out])
    return E[:, :out]


def _round(code: Code, record: Value, strip: Value) -> None:
    out, columns, U, row = (code.field(record, p) for p in (Round.OUT, Round.COLUMNS, Round.U, Round.ROW))
    low, top = constant(0.0), _spread(code, code.field(record, Round.TOP))
    room, keep = _copied(code, code.field(record, Round.W), strip, out, columns), code.field(record, Round.KEEP)
    with code.loop(columns) as j:
        group = code.read(I64, code.plus(code.field(record, Round.GROUPS), (j, 8)), 8)
        s, z = (floats(code, _at(code, record, p, strip, out, group)) for p in (Round.SCALES, Round.ZEROS))
        w = floats(code, code.plus(room, (j, LINE)))
        c = code.variable(w.type, clamp(code, nearest(code, code.fadd(code.fdiv(w, s), z)), low, top))
        with code.if_then(code.nonzero(keep)):
            code.set(c, code.select(_flags(code, keep, strip, out, j), code.get(c), z))
        found = code.get(c)
        octets = code.trunc(code.fptosi(found, vector(I32, N)), vector(I8, N))
        code.write(octets, code.plus(code.field(record, Round.CODES), (strip, N), (j, out)))
        line = code.plus(U, (code.mul(j, row), 4))
        lost = code.fsub(w, code.fmul(code.fsub(found, z), s))
        e = code.fdiv(lost, scalar(code, code.plus(line, (j, 4))))
        code.write(e, _at(code, record, Round.ERRORS, strip, out, j), 4)
        _pass_on(code, room, line, j, columns, code.fneg(e))


ROUND = Loop("round columns", _round)


def _copied(code: Code, matrix: Value, strip: Value, out: Value, columns: Value) -> Value:
    """A strip of a block on the stack, one line after the other: in the matrix they would fall on each other in the
    cache."""
    room, start = code.room(MOST * LINE), code.plus(matrix, (strip, LINE))

    def copy(i: Value) -> None:
        code.write(floats(code, code.plus(start, (code.mul(i, out), 4))), code.plus(room, (i, LINE)), LINE)

    repeat(code, columns, code.number(0), copy)
    return room


def _pass_on(code: Code, room: Value, line: Value, j: Value, end: Value, e: Value) -> None:
    """The columns i > j grow by line_i·e, rounded once: torch's `addr_` does the same."""

    def change(i: Value) -> None:
        place = code.plus(room, (i, LINE))
        code.write(code.fma(scalar(code, code.plus(line, (i, 4))), e, code.read(e.type, place, LINE)), place, LINE)

    repeat(code, end, code.plus(j, 1), change)


def _at(code: Code, record: Value, matrix: IntEnum, strip: Value, out: Value, row: Value) -> Value:
    """Address of a strip's line in a float32 matrix."""
    return code.plus(code.field(record, matrix), (strip, LINE), (code.mul(row, out), 4))


def _flags(code: Code, matrix: Value, strip: Value, out: Value, row: Value) -> Value:
    """A strip's line of a bool matrix."""
    flags = code.read(vector(I8, N), code.plus(matrix, (strip, N), (row, out)))
    return code.icmp_signed("!=", flags, splat(I8, N, 0))


def _spread(code: Code, integer: Value) -> Value:
    return code.spread(code.sitofp(integer, F32), N)

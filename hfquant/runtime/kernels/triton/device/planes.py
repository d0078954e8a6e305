"""y = x Ŵᵀ for weights of 2 to 8 bits and 16-bit floats x: one kernel, made for each width by its constants.

A program computes OUTS output features of ROWS rows of x.  Hopper's tensor cores take their first operand from
registers and the second from shared memory: so the weights, which are computed, come first, and the accumulator is
yᵀ [OUTS, ROWS].  An instruction takes as few as eight rows, so that one row needs no kernel of its own.

    for each unit of columns:   t = (code − zero point) · x,   acc += scale · t

What multiplies x is an integer that 16 bits hold exactly; scales are applied to float32 sums.

The columns may be split over several programs: see `splits`.
"""

import triton
import triton.language as tl

from .fields import INTERPRETED, centred, part_of, parts_of, planes_in, step_of, tiles_of
from .splits import meet, store, summed


@triton.jit
def read(words_ptr, steps, step, BITS: tl.constexpr, FIELD: tl.constexpr, I: tl.constexpr):
    """Tile I [OUTS, FIELD] of a step; words_ptr [OUTS, 1] at the rows."""
    TILE: tl.constexpr = tiles_of(BITS, FIELD)[I]
    SIXTEENTH: tl.constexpr = step_of(BITS, FIELD) // 16  # words per bit: makes the alignment plain to see
    at = (steps * TILE[2] + step * TILE[1]) * SIXTEENTH + TILE[0] // 16 * TILE[1]
    return tl.load(words_ptr + (at + tl.arange(0, FIELD))[None, :])


@triton.jit
def read_step(words_ptr, steps, step, BITS: tl.constexpr, FIELD: tl.constexpr):
    """The tiles of a step, as a tuple."""
    COUNT: tl.constexpr = len(tiles_of(BITS, FIELD))
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (read(words_ptr, steps, step, BITS, FIELD, i),)
    return tiles


@triton.jit
def read_zero(zero_ptr, at):
    """Zero points, or None if all are the middle code."""
    if zero_ptr is None:
        return None
    else:
        return tl.load(zero_ptr + at)


@triton.jit
def weights(
    tiles,
    zero,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    COLUMN: tl.constexpr,
    PART: tl.constexpr,
    BFLOAT: tl.constexpr,
    ASM: tl.constexpr,
):
    """A part of FIELD columns of code − zero point, from COLUMN of the step on.  [OUTS, FIELD]"""
    HOW: tl.constexpr = part_of(BITS, FIELD, PART, COLUMN, BFLOAT)
    words = ()
    for i in tl.static_range(planes_in(HOW)):
        words = words + (tiles[HOW[5 + 3 * i]],)
    return centred(words, zero, BITS, HOW, BFLOAT, ASM)


@triton.jit
def add_field(
    t,
    tiles,
    zero,
    x_ptr,
    mask,
    first,
    in_features,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    COLUMN: tl.constexpr,
    TAIL: tl.constexpr,
    ASM: tl.constexpr,
):
    """t + FIELD columns of the weights times those of x.  x_ptr, mask [1, ROWS] at the rows"""
    BFLOAT: tl.constexpr = x_ptr.dtype.scalar.element_ty == tl.bfloat16
    column = first + COLUMN + tl.arange(0, FIELD)[:, None]
    if TAIL:
        mask = mask & (column < in_features)
    x = tl.load(x_ptr + column, mask=mask, other=0.0)  # [FIELD, ROWS]
    for part in tl.static_range(len(parts_of(BITS, BFLOAT))):
        w = weights(tiles, zero, BITS, FIELD, COLUMN, part, BFLOAT, ASM)
        t = tl.dot(w, x.to(w.dtype), t)
    return t


@triton.jit
def complete(acc, n, m, mask, bias_ptr, u_ptr, inner_ptr, outs, RANK: tl.constexpr):
    """acc + U innerᵀ + bias.  U [padded, RANK], inner [rows, RANK] in the type of x; bias [outs]"""
    if RANK:
        r = tl.arange(0, RANK)
        u = tl.load(u_ptr + n[:, None] * RANK + r[None, :])
        inner = tl.load(inner_ptr + m[None, :] * RANK + r[:, None], mask=mask, other=0.0)
        acc = tl.dot(u.to(acc.dtype), inner.to(acc.dtype), acc) if INTERPRETED else tl.dot(u, inner, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < outs, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["rows", "steps"])
def linear(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    bias_ptr,
    u_ptr,
    inner_ptr,
    partial_ptr,
    count_ptr,
    rows,
    outs,
    padded,
    in_features,
    steps,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
    ASM: tl.constexpr,
):
    """x [rows, in]; words int16 [padded, ·], scale and zero [groups, padded] as `layout.Weights` has them -> y."""
    STEP: tl.constexpr = step_of(BITS, FIELD)
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    mask = m[None, :] < rows
    words_row = words_ptr + (n.to(tl.int64) * (steps * (STEP // 16 * BITS)))[:, None]
    x_row = x_ptr + (m * in_features)[None, :]
    share = tl.cdiv(steps, SPLIT)
    begin = tl.program_id(1) * share
    acc = tl.zeros((OUTS, ROWS), tl.float32)
    for step in range(begin, tl.minimum(begin + share, steps)):
        tiles = read_step(words_row, steps, step, BITS, FIELD)
        for u in tl.static_range(STEP // UNIT):
            group = (step * STEP + u * UNIT) // GROUP
            if TAIL:  # what lies behind the last column is multiplied by 0, but must not be infinite
                group = tl.minimum(group, (in_features - 1) // GROUP)
            zero = read_zero(zero_ptr, group * padded + n)
            t = tl.zeros((OUTS, ROWS), tl.float32)
            for i in tl.static_range(UNIT // FIELD):
                t = add_field(
                    t, tiles, zero, x_row, mask, step * STEP, in_features, BITS, FIELD, u * UNIT + i * FIELD, TAIL, ASM
                )
            acc += tl.load(scale_ptr + group * padded + n).to(tl.float32)[:, None] * t
    if SPLIT == 1:
        store(y_ptr, complete(acc, n, m, mask, bias_ptr, u_ptr, inner_ptr, outs, RANK), n, m, mask, outs)
    else:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        last = meet(acc, n, m, mask, partial_ptr, count_ptr, tile, tl.program_id(1), rows, padded, SPLIT, JOIN)
        if last:
            total = summed(partial_ptr, n, m, mask, rows, padded, SPLIT)
            store(y_ptr, complete(total, n, m, mask, bias_ptr, u_ptr, inner_ptr, outs, RANK), n, m, mask, outs)


@triton.jit(do_not_specialize=["rows"])
def join(
    partial_ptr,
    y_ptr,
    bias_ptr,
    u_ptr,
    inner_ptr,
    rows,
    outs,
    padded,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y from partial sums [SPLIT, rows, padded]."""
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = m[None, :] < rows
    acc = summed(partial_ptr, n, m, mask, rows, padded, SPLIT)
    store(y_ptr, complete(acc, n, m, mask, bias_ptr, u_ptr, inner_ptr, outs, RANK), n, m, mask, outs)

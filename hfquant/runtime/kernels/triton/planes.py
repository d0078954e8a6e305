"""y = x Ŵᵀ for weights of 2 to 8 bits and 16-bit floats x: one kernel, made for each width by its constants.

A program computes OUTS output features of ROWS rows of x.  Hopper's tensor cores take their first operand from
registers and the second from shared memory: so the weights, which are computed, come first, and the accumulator is
yᵀ [OUTS, ROWS].  Eight rows are enough for an instruction, and one row needs no kernel of its own.

    for each unit of columns:  t = Σ over planes and fields of  2^shift · (field − zero point's field) · x
                               acc += scale · t

All terms of t are integers times x, exact in 16 bits; scales are applied to the float32 sums.

Split over columns (SPLIT > 1), partial sums [SPLIT, rows, out'] are added up
    JOIN = "last"      by the program that finishes last, in a fixed order: the same bits in every run, one launch
    JOIN = "launch"    by a second launch (`join`), in the same order
    JOIN = "atomic"    in memory, in any order; then `join` adds the rest
"""

import triton
import triton.language as tl

from .fields import centred
from .layout import layout


@triton.constexpr_function
def tiles_of(bits, unit):
    """What a step reads of every row: tuples (first column in the step, width, shift, columns of a field)."""
    chosen = layout(bits, unit)
    return tuple(
        (first, plane.width, plane.shift, plane.field)
        for plane in chosen.planes
        for first in range(0, chosen.step, plane.block)
    )


@triton.constexpr_function
def terms_of(bits, unit):
    """The fields that make up each unit of a step: tuples (tile, field in its words, first column in the step)."""
    chosen, units = layout(bits, unit), {}
    for tile, (first, width, _, field) in enumerate(tiles_of.fn(bits, unit)):
        for j in range(16 // width):
            column = first + j * field
            units.setdefault(column // chosen.unit, []).append((tile, j, column))
    return tuple(tuple(units[u]) for u in sorted(units))


@triton.jit
def read(words_ptr, columns, first, TILE: tl.constexpr):
    """One tile [OUTS, field]; words_ptr [OUTS, 1] at the rows."""
    at = columns // 16 * TILE[2] + (first + TILE[0]) // 16 * TILE[1]
    return tl.load(words_ptr + (at + tl.arange(0, TILE[3]))[None, :])


@triton.jit
def add_term(
    t, tile, zero, x_ptr, first, in_features, mask,
    TILE: tl.constexpr, TERM: tl.constexpr, MIDDLE: tl.constexpr, TAIL: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """t + one field of a tile times its columns of x.  x_ptr, mask [1, ROWS] at the rows"""
    BFLOAT: tl.constexpr = x_ptr.dtype.scalar.element_ty == tl.bfloat16
    column = first + TERM[2] + tl.arange(0, TILE[3])[:, None]
    if TAIL:
        mask = mask & (column < in_features)
    x = tl.load(x_ptr + column, mask=mask, other=0.0)  # [field, ROWS]
    w = centred(tile, zero, TILE[1], TERM[1], TILE[2], MIDDLE, BFLOAT, ASM, INTERPRETED)  # [OUTS, field]
    return tl.dot(w, x.to(w.dtype), t)


@triton.jit
def linear(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr,
    rows, outs, in_features, columns, padded,
    BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):
    TILES: tl.constexpr = tiles_of(BITS, UNIT)
    TERMS: tl.constexpr = terms_of(BITS, UNIT)
    STEP: tl.constexpr = UNIT * len(TERMS)
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    mask = m[None, :] < rows
    row_words = words_ptr + (n.to(tl.int64) * (columns // 16 * BITS))[:, None]
    row_x = x_ptr + (m * in_features)[None, :]
    steps = columns // STEP
    share = tl.cdiv(steps, SPLIT)
    begin = tl.program_id(1) * share
    acc = tl.zeros((OUTS, ROWS), tl.float32)
    for step in range(begin, tl.minimum(begin + share, steps)):
        first = step * STEP
        tiles = ()
        for i in tl.static_range(len(TILES)):
            tiles = tiles + (read(row_words, columns, first, TILES[i]),)
        for u in tl.static_range(len(TERMS)):
            g = (first + u * UNIT) // GROUP
            if TAIL:
                g = tl.minimum(g, (in_features - 1) // GROUP)
            zero = None
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + g * padded + n)
            t = tl.zeros((OUTS, ROWS), tl.float32)
            for i in tl.static_range(len(TERMS[u])):
                t = add_term(
                    t, tiles[TERMS[u][i][0]], zero, row_x, first, in_features, mask,
                    TILES[TERMS[u][i][0]], TERMS[u][i], 2 ** (BITS - 1), TAIL, ASM, INTERPRETED,
                )
            scale = tl.load(scale_ptr + g * padded + n).to(tl.float32)
            acc += scale[:, None] * t
    tl.store(y_ptr + m[None, :] * outs + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask & (n[:, None] < outs))

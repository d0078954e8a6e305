"""y = x Ŵᵀ where both are 8-bit integers: tensor cores multiply and add them up exactly.

With codes c of a weight (scale s, zero point z) and q of x (scale t, zero point y), all of them signed, over the
columns that share them:   s·t · Σ (c − z)(q − y)   =   s·t · (Σ c·q  −  z·Σ q  −  y·Σ (c − z)).
The bracket is an integer and computed as one.  Σ q is a product with ones, which tensor cores have time for;
Σ (c − z) is known beforehand.  Weights of more than 4 bits are bytes.  Smaller ones lie two in a byte: byte i of a
block of HALF holds column i in its low bits and column HALF + i in its high ones, as codes + 8; an exclusive or makes
them 16·c.

As in `planes`, weights come first, and sums may be split over columns: exact sums stay integers until they meet.
"""

import triton
import triton.language as tl

from .fields import INTERPRETED
from .splits import meet, store, summed


@triton.jit
def high(byte, ASM: tl.constexpr):
    """16 · (high nibble − 8)"""
    if ASM:
        text: tl.constexpr = "lop3.b32 $0, $1, 0xf0f0f0f0, 0x80808080, 0x6a;"
        return tl.inline_asm_elementwise(text, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((byte & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def low(byte, ASM: tl.constexpr):
    """16 · (low nibble − 8)"""
    if ASM:
        text: tl.constexpr = "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xf0f0f0f0, 0x80808080, 0x6a; }"
        return tl.inline_asm_elementwise(text, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((byte << 4) ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def multiply(a, b, total):
    """total + a b, exact"""
    if INTERPRETED:  # which multiplies bytes in floats
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32)).to(tl.int32)
    else:
        return tl.dot(a, b, total, out_dtype=tl.int32)


@triton.jit
def products(
    codes_row,
    q_row,
    mask,
    at,
    total,
    sums,
    UNIT: tl.constexpr,
    NIBBLES: tl.constexpr,
    SUMS: tl.constexpr,
    ASM: tl.constexpr,
):
    """total + Σ c·q over UNIT columns (16 times that where codes are nibbles, as all sums are then), and with SUMS
    sums + Σ q in every row of it.

    codes_row [OUTS, 1]; q_row, mask [1, ROWS]
    """
    if NIBBLES:
        HALF: tl.constexpr = UNIT // 2
        k = tl.arange(0, HALF)
        byte = tl.load(codes_row + (at // 2 + k)[None, :])
        first = tl.load(q_row + (at + k)[:, None], mask=mask, other=0)
        second = tl.load(q_row + (at + HALF + k)[:, None], mask=mask, other=0)
        ones = tl.full(byte.shape, 1, tl.int8)
        if SUMS:
            sums = multiply(ones, second, multiply(ones, first, sums))
        total = multiply(high(byte, ASM), second, multiply(low(byte, ASM), first, total))
    else:
        k = tl.arange(0, UNIT)
        codes = tl.load(codes_row + (at + k)[None, :])
        q = tl.load(q_row + (at + k)[:, None], mask=mask, other=0)
        if SUMS:
            sums = multiply(tl.full(codes.shape, 1, tl.int8), q, sums)
        total = multiply(codes, q, total)
    return total, sums


@triton.jit
def without_zero(total, sums, z_ptr, at, NIBBLES: tl.constexpr):
    """total − z·Σ q;  z_ptr + at [OUTS]"""
    if z_ptr is not None:
        total -= (sums << 4 if NIBBLES else sums) * tl.load(z_ptr + at).to(tl.int32)[:, None]
    return total


@triton.jit
def without_shift(total, y_ptr, c_ptr, y_at, c_at, inside, NIBBLES: tl.constexpr):
    """total − y·Σ (c − z);  y_ptr + y_at [ROWS], c_ptr + c_at [OUTS]"""
    if y_ptr is not None:
        y = tl.load(y_ptr + y_at, mask=inside, other=0.0).to(tl.int32)
        total -= (y << 4 if NIBBLES else y)[None, :] * tl.load(c_ptr + c_at)[:, None]
    return total


@triton.jit
def scale_of(scale_ptr, at, NIBBLES: tl.constexpr):
    """[OUTS, 1], of sums that are 16 times too large where codes are nibbles."""
    return tl.load(scale_ptr + at).to(tl.float32)[:, None] * (0.0625 if NIBBLES else 1.0)


@triton.jit(do_not_specialize=["rows", "stride", "groups", "spans"])
def rounded(
    q_ptr,
    t_ptr,
    y_ptr,
    codes_ptr,
    scale_ptr,
    z_ptr,
    c_ptr,
    out_ptr,
    bias_ptr,
    partial_ptr,
    count_ptr,
    rows,
    outs,
    padded,
    columns,
    stride,
    groups,
    spans,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    UNIT: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    BAND: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
    ASM: tl.constexpr,
):
    """q int8 [rows, columns], zeros behind the last column; codes [padded, ·]; scale, z [groups, padded] -> out.

    t, y: [·, spans], a row of them for each of x, `stride` apart.  GROUP, SPAN: columns that share a scale of the
    weight, and of x; 0: all.  c int32: Σ (c − z) over all columns or, if there are groups or spans, over each UNIT.
    """
    WHOLE: tl.constexpr = GROUP == 0 and SPAN == 0
    # programs of BAND blocks of rows follow each other, so that they find their weights in the cache
    tiles = tl.cdiv(outs, OUTS)
    band = tl.program_id(0) // (BAND * tiles) * BAND
    height = tl.minimum(tl.cdiv(rows, ROWS) - band, BAND)
    place = tl.program_id(0) % (BAND * tiles)
    n = place // height * OUTS + tl.arange(0, OUTS)
    m = (band + place % height) * ROWS + tl.arange(0, ROWS)
    inside = m < rows
    codes_row = codes_ptr + (n.to(tl.int64) * (columns // 2 if NIBBLES else columns))[:, None]
    q_row = q_ptr + (m.to(tl.int64) * columns)[None, :]
    share = tl.cdiv(columns // UNIT, SPLIT) * UNIT
    begin = tl.program_id(1) * share
    total = tl.zeros((OUTS, ROWS), tl.int32)
    sums = tl.zeros((OUTS, ROWS), tl.int32)
    acc = tl.zeros((OUTS, ROWS), tl.float32)
    for at in range(begin, tl.minimum(begin + share, columns), UNIT):
        total, sums = products(
            codes_row, q_row, inside[None, :], at, total, sums, UNIT, NIBBLES, z_ptr is not None, ASM
        )
        if not WHOLE:
            group = tl.minimum(at // GROUP, groups - 1) if GROUP else 0
            span = tl.minimum(at // SPAN, spans - 1) if SPAN else 0
            total = without_zero(total, sums, z_ptr, group * padded + n, NIBBLES)
            total = without_shift(total, y_ptr, c_ptr, m * stride + span, at // UNIT * padded + n, inside, NIBBLES)
            part = total.to(tl.float32) * scale_of(scale_ptr, group * padded + n, NIBBLES)
            acc += part * tl.load(t_ptr + m * stride + span, mask=inside, other=0.0)[None, :] if SPAN else part
            total = tl.zeros((OUTS, ROWS), tl.int32)
            sums = tl.zeros((OUTS, ROWS), tl.int32)
    if WHOLE:
        total = without_zero(total, sums, z_ptr, n, NIBBLES)
    finish_rounded(
        total if WHOLE else acc,
        n,
        m,
        t_ptr,
        y_ptr,
        scale_ptr,
        c_ptr,
        out_ptr,
        bias_ptr,
        partial_ptr,
        count_ptr,
        rows,
        outs,
        padded,
        stride,
        WHOLE,
        SPAN,
        NIBBLES,
        SPLIT,
        JOIN,
    )


@triton.jit
def complete_rounded(
    acc,
    n,
    m,
    t_ptr,
    y_ptr,
    scale_ptr,
    c_ptr,
    out_ptr,
    bias_ptr,
    rows,
    outs,
    stride,
    WHOLE: tl.constexpr,
    SPAN: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    """Scale the sums and store them."""
    inside = m < rows
    if WHOLE:
        acc = without_shift(acc, y_ptr, c_ptr, m * stride, n, inside, NIBBLES)
        acc = acc.to(tl.float32) * scale_of(scale_ptr, n, NIBBLES)
    if SPAN == 0:
        acc *= tl.load(t_ptr + m * stride, mask=inside, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < outs, other=0.0).to(tl.float32)[:, None]
    store(out_ptr, acc, n, m, inside[None, :], outs)


@triton.jit
def finish_rounded(
    acc,
    n,
    m,
    t_ptr,
    y_ptr,
    scale_ptr,
    c_ptr,
    out_ptr,
    bias_ptr,
    partial_ptr,
    count_ptr,
    rows,
    outs,
    padded,
    stride,
    WHOLE: tl.constexpr,
    SPAN: tl.constexpr,
    NIBBLES: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
):
    """Store the sums of a program's columns, or the results if they are all."""
    if SPLIT == 1:
        complete_rounded(
            acc, n, m, t_ptr, y_ptr, scale_ptr, c_ptr, out_ptr, bias_ptr, rows, outs, stride, WHOLE, SPAN, NIBBLES
        )
    else:
        mask = (m < rows)[None, :]
        tile, share = tl.program_id(0), tl.program_id(1)
        last = meet(acc, n, m, mask, partial_ptr, count_ptr, tile, share, rows, padded, SPLIT, JOIN)
        if last:
            total = summed(partial_ptr, n, m, mask, rows, padded, SPLIT)
            complete_rounded(
                total, n, m, t_ptr, y_ptr, scale_ptr, c_ptr, out_ptr, bias_ptr, rows, outs, stride, WHOLE, SPAN, NIBBLES
            )


@triton.jit(do_not_specialize=["rows", "stride"])
def join_rounded(
    partial_ptr,
    t_ptr,
    y_ptr,
    scale_ptr,
    c_ptr,
    out_ptr,
    bias_ptr,
    rows,
    outs,
    padded,
    stride,
    WHOLE: tl.constexpr,
    SPAN: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Results from partial sums [SPLIT, rows, padded]."""
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    acc = summed(partial_ptr, n, m, (m < rows)[None, :], rows, padded, SPLIT)
    complete_rounded(
        acc, n, m, t_ptr, y_ptr, scale_ptr, c_ptr, out_ptr, bias_ptr, rows, outs, stride, WHOLE, SPAN, NIBBLES
    )

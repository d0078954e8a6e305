"""Rounding x to 8-bit integers: `tensors.activations`, bit for bit, in one launch.

scale = max|x| / top and code = round(x / scale), or with zero points scale = (max − min) / 255; one scale for a row, or
for each `span` columns of it.  Divisions are exact ones, and halves go to even: the interpreter and a GPU give the
reference's integers.
"""

import triton
import triton.language as tl

from .....tensors.activations import LEAST

LEAST_SCALE = tl.constexpr(LEAST)


@triton.jit
def nearest(v):
    """Rounded to an integer, halves to even, for |v| < 2²²: there float32 has no room for fractions."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def extremes(x_ptr, begin, end, BLOCK: tl.constexpr):
    """The least and the greatest of x and 0, over columns begin .. end − 1."""
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for at in range(begin, end, BLOCK):
        k = at + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + k, mask=k < end, other=0.0).to(tl.float32)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def fitted(low, high, BOTTOM: tl.constexpr, TOP: tl.constexpr):
    """Scale and zero point for values in [low, high]."""
    if BOTTOM == -TOP:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), TOP * 1.0), LEAST_SCALE)
        zero = scale * 0.0
    else:
        scale = tl.maximum(tl.div_rn(high - low, (TOP - BOTTOM) * 1.0), LEAST_SCALE)
        zero = tl.minimum(tl.maximum(BOTTOM - nearest(tl.div_rn(low, scale)), BOTTOM * 1.0), TOP * 1.0)
    return scale, zero


@triton.jit(do_not_specialize=["spans", "stride"])
def quantize(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    in_features,
    columns,
    span,
    spans,
    stride,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program rounds one span of one row.  GIVEN: scales and zero points are, `stride` apart."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_row = x_ptr + row * in_features
    q_row = q_ptr + row * columns
    begin = i * span
    end = tl.minimum(begin + span, in_features)
    at_scale = row * stride + i
    if GIVEN:
        scale = tl.load(scale_ptr + at_scale)
        zero = tl.load(zero_ptr + at_scale) if zero_ptr is not None else scale * 0.0
    else:
        low, high = extremes(x_row, begin, end, BLOCK)
        scale, zero = fitted(low, high, BOTTOM, TOP)
        tl.store(scale_ptr + at_scale, scale)
        if zero_ptr is not None:
            tl.store(zero_ptr + at_scale, zero)
    behind = columns if i == spans - 1 else end  # the last one also writes the zeros
    for at in range(begin, behind, BLOCK):
        k = at + tl.arange(0, BLOCK)
        x = tl.load(x_row + k, mask=k < end, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(nearest(tl.div_rn(x, scale)) + zero, BOTTOM * 1.0), TOP * 1.0)
        tl.store(q_row + k, tl.where(k < end, code, 0.0).to(tl.int8), mask=k < behind)

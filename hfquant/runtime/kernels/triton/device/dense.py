"""scale · (code − zero point) as 16-bit floats [out, in].

The product with the scale is one of float32, rounded once: bit for bit what the reference decodes.
"""

import triton
import triton.language as tl

from .fields import parts_of, step_of
from .planes import read_step, read_zero, weights


@triton.jit(do_not_specialize=["steps"])
def decode(
    words_ptr,
    scale_ptr,
    zero_ptr,
    w_ptr,
    outs,
    padded,
    in_features,
    steps,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    OUTS: tl.constexpr,
    ASM: tl.constexpr,
):
    """A program decodes a step of OUTS rows."""
    BFLOAT: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    STEP: tl.constexpr = step_of(BITS, FIELD)
    n = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    step = tl.program_id(0)
    tiles = read_step(words_ptr + (n.to(tl.int64) * (steps * (STEP // 16 * BITS)))[:, None], steps, step, BITS, FIELD)
    row = w_ptr + (n.to(tl.int64) * in_features)[:, None]
    for u in tl.static_range(STEP // UNIT):
        group = tl.minimum(step * STEP + u * UNIT, in_features - 1) // GROUP
        zero = read_zero(zero_ptr, group * padded + n)
        scale = tl.load(scale_ptr + group * padded + n).to(tl.float32)[:, None]
        for i in tl.static_range(UNIT // FIELD):
            column = step * STEP + u * UNIT + i * FIELD + tl.arange(0, FIELD)[None, :]
            w = weights(tiles, zero, BITS, FIELD, u * UNIT + i * FIELD, 0, BFLOAT, ASM).to(tl.float32)
            for part in tl.static_range(1, len(parts_of(BITS, BFLOAT))):
                w += weights(tiles, zero, BITS, FIELD, u * UNIT + i * FIELD, part, BFLOAT, ASM).to(tl.float32)
            mask = (n[:, None] < outs) & (column < in_features)
            tl.store(row + column, (w * scale).to(w_ptr.dtype.element_ty), mask=mask)

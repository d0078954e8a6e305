"""Codes to 16-bit floats in a shift and a logical operation, two at a time, without a conversion.

A float whose exponent is fixed counts in equal steps: with the bits of a field in the mantissa of the right power of
two, the number is base + 2^shift · field, exactly.  So a field is moved to the mantissa, or already lies in it, and the
exponent is put around it: (word >> s & mask) | magic.  Several neighbouring fields lie in the mantissa at once (7 bits
wide in bfloat16, 10 in float16), each at a place of its own with a base of its own, and need one shift together.

The pure form is what the interpreter can run; the other one is the same in PTX, for two words of a register at once.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def placed(width, j, shift, bfloat):
    """Field j of a word of such fields -> (right shift of the word, mask, magic, base)."""
    mantissa, bias = (7, 127) if bfloat else (10, 15)
    least = max(0, mantissa + shift - bias)  # further down the base would be infinite
    together = (mantissa - least) // width  # fields that one shift brings into the mantissa
    right = j // together * together * width - least
    place = j * width - right
    exponent = mantissa - place + shift
    return right, (2**width - 1) << place, (bias + exponent) << mantissa, 2.0**exponent


@triton.constexpr_function
def middle_of(width, shift, middle):
    """The part of a zero point that lies in the plane."""
    return float(middle & ((2**width - 1) << shift))


@triton.constexpr_function
def assembly(width, j, shift, bfloat):
    right, mask, magic, _ = placed.fn(width, j, shift, bfloat)
    take = f"lop3.b32 $0, {'t' if right else '$1'}, 0x{mask:04x}{mask:04x}, 0x{magic:04x}{magic:04x}, 0xea;"
    move = f"shr.u32 t, $1, {right};" if right > 0 else f"shl.b32 t, $1, {-right};"
    return f"{{ .reg .b32 t; {move} {take} }}" if right else take


@triton.jit
def raised(word, WIDTH: tl.constexpr, J: tl.constexpr, SHIFT: tl.constexpr, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """int16 words -> base + 2^SHIFT · field J"""
    if ASM:
        text: tl.constexpr = assembly(WIDTH, J, SHIFT, BFLOAT)
        if BFLOAT:
            return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    else:
        how: tl.constexpr = placed(WIDTH, J, SHIFT, BFLOAT)
        moved = word >> how[0] if how[0] >= 0 else word << -how[0]
        bits = ((moved & how[1]) | how[2]).to(tl.int16)
        return bits.to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True)


@triton.jit
def centred(
    word,
    zero,
    WIDTH: tl.constexpr,
    J: tl.constexpr,
    SHIFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    BFLOAT: tl.constexpr,
    ASM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """2^SHIFT · (field J − the same bits of the zero point), exact.

    word [rows, columns]; zero int16 [rows], whole zero points, or None: then all are MIDDLE.
    """
    how: tl.constexpr = placed(WIDTH, J, SHIFT, BFLOAT)
    value = raised(word, WIDTH, J, SHIFT, BFLOAT, ASM)
    if INTERPRETED:  # whose bfloat16 is bits, and has no arithmetic
        value = value.to(tl.float32)
    if zero is None:
        return value - (how[3] + middle_of(WIDTH, SHIFT, MIDDLE))
    else:
        place: tl.constexpr = how[1] // (2**WIDTH - 1)
        bits = (((zero >> SHIFT) & (2**WIDTH - 1)) * place | how[2]).to(tl.int16)
        base = bits.to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True)
        return value - base.to(value.dtype)[:, None]

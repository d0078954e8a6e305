"""Codes to 16-bit floats in shifts and logical operations, two at a time, without a conversion.

A float whose exponent is fixed counts in equal steps: with the bits of a code in the mantissa of the right power of two
the number is base + code, exactly.  So a field is moved to the mantissa, or already lies in it, and the exponent is put
around it: (word >> s & mask) | magic.  The fields of a code's other planes are moved next to it in the same way.
Several fields may lie in the mantissa at once, each at a place and with a base of its own, and then need one shift
together.  Where the mantissa is too short for a code (7 bits in bfloat16) it is taken in two parts.

The pure form is what the interpreter can run; the other one is the same in PTX, for two words of a register at once.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # read when kernels are decorated, as triton does


@triton.constexpr_function
def planes_of(bits):
    """(width, shift) of the planes of a code, the low one first: as `tensors.packing.planes` has them."""
    found, shift = [], 0
    while shift < bits:
        width = 4 if bits - shift >= 4 else 2 if bits - shift >= 2 else 1
        found.append((width, shift))
        shift += width
    return tuple(found)


@triton.constexpr_function
def tiles_of(bits, field):
    """What a step of a row is read in: (first column in the step, width, shift)."""
    step = step_of(bits, field)
    return tuple(
        (first, width, shift) for width, shift in planes_of(bits) for first in range(0, step, 16 // width * field)
    )


@triton.constexpr_function
def step_of(bits, field):
    """Columns after which all planes begin a block."""
    return max(16 // width * field for width, _ in planes_of(bits))


@triton.constexpr_function
def parts_of(bits, bfloat):
    """The planes that share a mantissa: tuples of (width, shift)."""
    parts: list[list[tuple[int, int]]] = [[]]
    for width, shift in planes_of(bits):
        if width + sum(w for w, _ in parts[-1]) > (7 if bfloat else 10):
            parts.append([])
        parts[-1].append((width, shift))
    return tuple(map(tuple, parts))


@triton.constexpr_function
def part_of(bits, field, part, column, bfloat):
    """How a part of the codes of `field` columns of a step is made, the numbers in one tuple:

    magic, base; right shift, mask, left shift that make the same part of a whole zero point; and for each plane
    tile, right shift and mask.
    """
    mantissa, bias = (7, 127) if bfloat else (10, 15)
    planes = parts_of(bits, bfloat)[part]
    tiles = [(width, shift, first) for first, width, shift in tiles_of(bits, field)]
    low, lowest = planes[0]
    total = sum(width for width, _ in planes)
    least = max(0, mantissa + lowest - bias)  # further down the base would be infinite
    together = (mantissa - least - total) // low + 1  # fields of the low plane that one shift brings into place
    place = column % (16 // low * field) // field % together * low + least
    found = []
    for width, shift in planes:
        block = 16 // width * field
        target = place + shift - lowest
        right = column % block // field * width - target
        found += [tiles.index((width, shift, column // block * block)), right, (2**width - 1) << target]
    exponent = mantissa - place + lowest
    return ((bias + exponent) << mantissa, 2.0**exponent, lowest, 2**total - 1, place, *found)


@triton.constexpr_function
def planes_in(part):
    return (len(part) - 5) // 3


@triton.constexpr_function
def middle_of(part, bits):
    """The part of the middle code."""
    return float(2 ** (bits - 1) & part[3] << part[2])


@triton.constexpr_function
def assembly(part):
    """PTX for two words of each plane -> two floats."""
    lines, around, count = [], f"0x{part[0]:04x}{part[0]:04x}", planes_in(part)
    for i in range(count):
        right, mask, source = part[6 + 3 * i], part[7 + 3 * i], f"${i + 1}"
        if right:
            lines.append(f"{'shr' if right > 0 else 'shl'}.b32 t, {source}, {abs(right)};")
            source = "t"
        into = "$0" if i == count - 1 else "r"
        lines.append(f"lop3.b32 {into}, {source}, 0x{mask:04x}{mask:04x}, {around}, 0xea;")
        around = "r"
    return f"{{ .reg .b32 r, t; {' '.join(lines)} }}"


@triton.constexpr_function
def registers(part):
    return "=r" + ",r" * planes_in(part)


@triton.jit
def moved(word, RIGHT: tl.constexpr, MASK: tl.constexpr):
    return ((word >> RIGHT) if RIGHT >= 0 else (word << -RIGHT)) & MASK


@triton.jit
def joined(words, PART: tl.constexpr, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """base + code, from int16 words of each plane."""
    if ASM:
        text: tl.constexpr = assembly(PART)
        inputs: tl.constexpr = registers(PART)
        if BFLOAT:
            return tl.inline_asm_elementwise(text, inputs, words, dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(text, inputs, words, dtype=tl.float16, is_pure=True, pack=2)
    else:
        bits = moved(words[0], PART[6], PART[7]) | PART[0]
        for i in tl.static_range(1, planes_in(PART)):
            bits |= moved(words[i], PART[6 + 3 * i], PART[7 + 3 * i])
        return bits.to(tl.int16).to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True)


@triton.jit
def centred(
    words,
    zero,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    BFLOAT: tl.constexpr,
    ASM: tl.constexpr,
):
    """A part of code − zero point, exact.

    words: those of each plane, [rows, columns]; zero int16 [rows], or None: then all zero points are the middle code.
    """
    value = joined(words, PART, BFLOAT, ASM)
    if INTERPRETED:  # whose bfloat16 is bits, and has no arithmetic
        value = value.to(tl.float32)
    if zero is None:
        return value - (PART[1] + middle_of(PART, BITS))
    else:
        bits = ((((zero >> PART[2]) & PART[3]) << PART[4]) | PART[0]).to(tl.int16)
        base = bits.to(tl.bfloat16 if BFLOAT else tl.float16, bitcast=True)
        return value - base.to(value.dtype)[:, None]

"""Numbers of 16 and 32 bits, to and from float32."""

from .ir import F16, F32, I16, I32, Code, Value, splat, vector

TYPES = ("float32", "bfloat16", "float16")
SIZES = (4, 2, 2)


def floats(code: Code, kind: str, address: Value, n: int) -> Value:
    """n numbers of a stored type as float32."""
    stored = {"float32": F32, "bfloat16": I16, "float16": F16}[kind]
    return widened(code, code.read(vector(stored, n), address), kind)


def widened(code: Code, y: Value, kind: str) -> Value:
    """What `typed` gives, as float32."""
    n = y.type.count
    if kind == "float32":
        return y
    if kind == "float16":
        return code.fpext(y, vector(F32, n))
    return code.bitcast(code.shl(code.zext(y, vector(I32, n)), splat(I32, n, 16)), vector(F32, n))


def typed(code: Code, y: Value, kind: str) -> Value:
    """float32, rounded to a type; the bits of it where that is bfloat16."""
    n = y.type.count
    if kind == "float32":
        return y
    if kind == "float16":
        return code.fptrunc(y, vector(F16, n))
    bits = code.bitcast(y, vector(I32, n))  # to the nearest, ties to even; NaN stays NaN
    odd = code.and_(code.lshr(bits, splat(I32, n, 16)), splat(I32, n, 1))
    nearest = code.lshr(code.add(bits, code.add(odd, splat(I32, n, 0x7FFF))), splat(I32, n, 16))
    rounded = code.select(code.fcmp_unordered("uno", y, y), splat(I32, n, 0x7FC0), nearest)
    return code.trunc(rounded, vector(I16, n))

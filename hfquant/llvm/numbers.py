"""Numbers of 16 and 32 bits, to and from float32."""

from .ir import F16, F32, I16, I32, Code, Value, splat, vector

TYPES = ("float32", "bfloat16", "float16")
SIZES = (4, 2, 2)


def floats(code: Code, kind: str, address: Value, n: int) -> Value:
    """n numbers of a stored type as float32."""
    if kind == "float32":
        return code.read(vector(F32, n), address)
    if kind == "float16":
        return code.fpext(code.read(vector(F16, n), address), vector(F32, n))
    wide = code.zext(code.read(vector(I16, n), address), vector(I32, n))
    return code.bitcast(code.shl(wide, splat(I32, n, 16)), vector(F32, n))


def typed(code: Code, y: Value, kind: str) -> Value:
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

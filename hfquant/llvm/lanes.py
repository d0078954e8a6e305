"""Arithmetic over the lanes of a strip of float32."""

import math
from collections.abc import Callable

from .ir import I32, Code, Value, splat, vector
from .strips import FLOATS, N, constant, nearest


def everywhere(code: Code, value: Value, join: Callable[[Value, Value], Value]) -> Value:
    """All lanes joined, in all lanes."""
    for k in (8, 4, 2, 1):
        value = join(value, code.shuffle(value, [i ^ k for i in range(N)]))
    return value


def larger(code: Code, a: Value, b: Value) -> Value:
    return code.select(code.fcmp_ordered(">", a, b), a, b)


def exp2(code: Code, x: Value) -> Value:
    """2ˣ for x up to 0, by Taylor's series around the nearest integer: to float32's last places; 0 below 2⁻¹²⁶"""
    x = larger(code, constant(-127.0), x)  # NaN stays
    whole = nearest(code, x)
    rest, found = code.fsub(x, whole), constant(math.log(2) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):
        found = code.fma(found, rest, constant(math.log(2) ** k / math.factorial(k)))
    power = code.add(code.fptosi(whole, vector(I32, N)), splat(I32, N, 127))
    return code.fmul(found, code.bitcast(code.shl(power, splat(I32, N, 23)), FLOATS))

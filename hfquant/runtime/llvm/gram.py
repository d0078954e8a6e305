"""Sums over tokens, S += xᵀy in float32: what GPTQ's Hessian is made of.

x and y are packed into panels of 48 columns, [panel, depth, 48], that all tiles of S pass over again and again.  Where
the processor multiplies bfloat16 (`dot`), a depth is two tokens side by side, products are exact and sums float32; else
it is one token in float32.  A tile of S is 48 x 48, computed by one thread over all tokens in one order: the same bytes
for any number of threads.  xᵀx takes the tiles on and below the diagonal only: half the work.
"""

from array import array
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from . import engine
from .ir import F32, I16, I32, I64, POINTER, Code, Value, splat, vector
from .machine import Level, level
from .threads import pool

WIDTH = 48  # columns of a panel
CHUNK = 128  # depths that are multiplied while both panels stay in the first cache
WORTH = 1 << 22  # multiplications that are worth a second thread


class Sum(IntEnum):
    """What `gram` is told."""

    X = 0  # [tokens, columns], contiguous
    Y = 1
    TOKENS = 2
    COLUMNS_X = 3
    COLUMNS_Y = 4
    PACKED_X = 5  # [panels, depth, 48] of 4 bytes each
    PACKED_Y = 6  # the same as PACKED_X for xᵀx
    DEPTH = 7
    SUM = 8  # float32 [columns of x, columns of y]
    TILES = 9
    NEXT = 10  # the next tile to take; starts at 0
    THREAD = 11  # addresses of OpenMP's functions; 0: one thread
    THREADS = 12
    BARRIER = 13


class _BFloat(ir.HalfType):  # type: ignore[misc]  # llvmlite has no annotations, and no such type
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()


def add(S: Tensor, x: Tensor, y: Tensor | None = None, at: Level | None = None) -> None:
    """S += xᵀy; without y S += xᵀx, on and below the diagonal, what is above being left undefined.

    S float32 [n, m]; x [tokens, n] and y [tokens, m] of one type, float32 or bfloat16.  at: the instructions to use, by
    default this machine's.
    """
    at = at or best()
    other = x if y is None else y
    if not (S.is_contiguous() and S.dtype == torch.float32 and S.shape == (x.shape[1], other.shape[1])):
        raise ValueError(f"the sum is float32 [{x.shape[1]}, {other.shape[1]}], not {S.dtype} {tuple(S.shape)}")
    if other.dtype != x.dtype or other.shape[0] != x.shape[0] or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"float32 or bfloat16 of the same tokens are summed, not {x.dtype} and {other.dtype}")
    x, other = x.contiguous(), other.contiguous()
    kind = _kind(at, x.dtype)
    depth = -(-x.shape[0] // 2) if kind == "dot" else x.shape[0]
    panels, beside = -(-x.shape[1] // WIDTH), -(-other.shape[1] // WIDTH)
    packed = [torch.empty(n * depth * WIDTH, dtype=torch.int32) for n in ([panels] if y is None else [panels, beside])]
    record = array("q", [0] * len(Sum))
    record[Sum.X], record[Sum.Y], record[Sum.TOKENS] = x.data_ptr(), other.data_ptr(), x.shape[0]
    record[Sum.COLUMNS_X], record[Sum.COLUMNS_Y] = x.shape[1], other.shape[1]
    record[Sum.PACKED_X], record[Sum.PACKED_Y] = packed[0].data_ptr(), packed[-1].data_ptr()
    record[Sum.DEPTH], record[Sum.SUM] = depth, S.data_ptr()
    record[Sum.TILES] = panels * (panels + 1) // 2 if y is None else panels * beside
    found = engine.function(at, f"gram {kind} {y is None}", "gram", lambda code: generate(code, kind, y is None))
    _run(found, record, threads=x.shape[0] * x.shape[1] * other.shape[1] // WORTH)


def _run(function: int, record: "array[int]", threads: int) -> None:
    openmp, threads = pool(), min(torch.get_num_threads(), threads)
    if openmp is None or threads < 2:
        engine.call(function, record)
        return
    record[Sum.THREAD], record[Sum.THREADS] = openmp.thread, openmp.threads
    record[Sum.BARRIER] = openmp.barrier
    openmp.parallel(function, record.buffer_info()[0], threads, 0)


@cache
def best() -> Level:
    """This machine's instructions, products of bfloat16 among them where it has those.

    Raises ImportError without llvmlite, OSError if the processor has nothing that is known here.
    """
    found = level()
    if found is None:
        raise OSError("this processor has no AVX2")
    if found.vector == 64 and llvm.get_host_cpu_features().get("avx512bf16"):
        return replace(found, name="avx512bf16", features=f"{found.features},+avx512bf16")
    return found


def _kind(at: Level, dtype: torch.dtype) -> str:
    """How x is packed: `dot`, or what it is unpacked from."""
    if dtype == torch.bfloat16:
        return "dot" if "avx512bf16" in at.features else "bfloat16"
    return "float32"


def generate(code: Code, kind: str, symmetric: bool) -> None:
    """`gram(record)`, what every thread runs: it packs its share of the tokens, waits, and takes tiles."""
    _packing(code, kind)
    _tile(code, kind)
    with code.function("gram", 1) as made:
        (record,) = made.args
        thread, threads = code.variable(I64, code.number(0)), code.variable(I64, code.number(1))
        many = code.nonzero(code.field(record, Sum.THREADS))
        with code.if_then(many):
            code.set(thread, code.sext(code.call_at(code.field(record, Sum.THREAD), returns=I32), I64))
            code.set(threads, code.sext(code.call_at(code.field(record, Sum.THREADS), returns=I32), I64))
        me, all_, depth = code.get(thread), code.get(threads), code.field(record, Sum.DEPTH)
        share = code.sdiv(code.mul(depth, me), all_), code.sdiv(code.mul(depth, code.plus(me, 1)), all_)
        sides = [(Sum.X, Sum.PACKED_X, Sum.COLUMNS_X)] + [(Sum.Y, Sum.PACKED_Y, Sum.COLUMNS_Y)] * (not symmetric)
        for of, packed, columns in sides:
            pointers = [code.field(record, place) for place in (of, packed, columns)]
            code.call(code.module.globals["pack"], [record, *pointers, *share])
        with code.if_then(many):
            code.call_at(code.field(record, Sum.BARRIER))
        with _taken(code, record) as item:
            i, j = (_below if symmetric else _anywhere)(code, record, item)
            code.call(code.module.globals["tile"], [record, i, j])


@contextmanager
def _taken(code: Code, record: Value) -> Any:
    """Within: the body for tiles that no other thread takes."""
    counter = code.inttoptr(code.plus(record, 8 * Sum.NEXT), POINTER)
    head, body, after = (code.append_basic_block(name) for name in ("take", "taken", "done"))
    code.branch(head)
    code.position_at_end(head)
    item = code.atomic_rmw("add", counter, code.number(1), "monotonic")
    code.cbranch(code.icmp_signed("<", item, code.field(record, Sum.TILES)), body, after)
    code.position_at_end(body)
    yield item
    code.branch(head)
    code.position_at_end(after)


def _anywhere(code: Code, record: Value, item: Value) -> tuple[Value, Value]:
    across = code.sdiv(code.plus(code.field(record, Sum.COLUMNS_Y), WIDTH - 1), code.number(WIDTH))
    return code.sdiv(item, across), code.srem(item, across)


def _below(code: Code, record: Value, item: Value) -> tuple[Value, Value]:
    """Of a lower triangle, row after row."""
    row, start = code.variable(I64, code.number(0)), code.variable(I64, code.number(0))
    head, body, after = (code.append_basic_block(name) for name in ("row", "next", "found"))
    code.branch(head)
    code.position_at_end(head)
    behind = code.plus(code.get(start), code.get(row), 1)
    code.cbranch(code.icmp_signed("<=", behind, item), body, after)
    code.position_at_end(body)
    code.set(row, code.plus(code.get(row), 1))
    code.set(start, behind)
    code.branch(head)
    code.position_at_end(after)
    return code.get(row), code.sub(item, code.get(start))


def _packing(code: Code, kind: str) -> None:
    """`pack(record, x, packed, columns, begin, end)`: these depths of all panels"""
    size = 4 if kind == "float32" else 2
    lanes = 16
    with code.function("pack", 6, exported=False) as made:
        record, x, packed, columns, begin, end = made.args
        tokens, depth = code.field(record, Sum.TOKENS), code.field(record, Sum.DEPTH)
        whole, rest = code.sdiv(columns, code.number(WIDTH)), code.srem(columns, code.number(WIDTH))
        row_bytes = code.mul(columns, code.number(size))
        with code.loop(end, begin) as t:
            row, second = _tokens(code, kind, x, t, tokens, row_bytes)

            def panel(p: Value, t: Value = t) -> Value:
                return code.plus(packed, (code.plus(t, (p, depth)), 4 * WIDTH))

            def words(offset: Value, n: int, row: Value = row, second: Any = second) -> Value:
                return _words(code, kind, row, second, offset, n)

            with code.loop(whole) as p:
                for c in range(0, WIDTH, lanes):
                    offset = code.plus(code.number(size * c), (p, size * WIDTH))
                    code.write(words(offset, lanes), code.plus(panel(p), 4 * c))
            with code.if_then(code.nonzero(rest)):
                for c in range(0, WIDTH, lanes):
                    code.write(splat(I32, lanes, 0), code.plus(panel(whole), 4 * c))
                with code.loop(rest) as c:
                    offset = code.mul(code.plus(c, (whole, WIDTH)), code.number(size))
                    code.write(words(offset, 1), code.plus(panel(whole), (c, 4)))


def _tokens(code: Code, kind: str, x: Value, t: Value, tokens: Value, row_bytes: Value) -> tuple[Value, Any]:
    """Addresses of the tokens at one depth; of the second, if there are two, also whether it is there."""
    if kind != "dot":
        return code.plus(x, (t, row_bytes)), None
    first = code.plus(x, (code.mul(t, code.number(2)), row_bytes))
    there = code.icmp_signed("<", code.plus(code.mul(t, code.number(2)), 1), tokens)
    return first, (code.select(there, code.plus(first, row_bytes), first), there)


def _words(code: Code, kind: str, row: Value, second: Any, offset: Value, n: int) -> Value:
    """n columns of one depth, 4 bytes each."""
    wide = vector(I32, n)
    if kind == "float32":
        return code.read(wide, code.plus(row, offset), 4)
    low = code.zext(code.read(vector(I16, n), code.plus(row, offset), 2), wide)
    if kind == "bfloat16":
        return code.shl(low, splat(I32, n, 16))
    address, there = second
    high = code.shl(code.zext(code.read(vector(I16, n), code.plus(address, offset), 2), wide), splat(I32, n, 16))
    return code.or_(low, code.select(there, high, splat(I32, n, 0)))


def _tile(code: Code, kind: str) -> None:
    """`tile(record, i, j)`: 48 columns of x by 48 of y"""
    lanes = code.level.lanes
    across, down = (3, 8) if code.level.vector == 64 else (2, 6)  # vectors, columns of x: what fits into registers
    multiply = _dot(code, lanes) if kind == "dot" else _fma(code, lanes)
    with code.function("tile", 3, exported=False) as made:
        record, i, j = made.args
        depth = code.field(record, Sum.DEPTH)
        panel = code.mul(depth, code.number(4 * WIDTH))
        xs, ys = (
            code.plus(code.field(record, Sum.PACKED_X), (i, panel)),
            code.plus(code.field(record, Sum.PACKED_Y), (j, panel)),
        )
        sums = code.room(4 * WIDTH * WIDTH)
        with code.loop(code.number(4 * WIDTH * WIDTH), step=4 * lanes) as at:
            code.write(splat(F32, lanes, 0.0), code.plus(sums, at), 4 * lanes)
        with code.loop(depth, step=CHUNK) as begin:
            end = code.least(code.plus(begin, CHUNK), depth)
            with code.loop(code.number(WIDTH), step=down) as r, code.loop(code.number(WIDTH), step=across * lanes) as c:
                _multiplied(code, multiply, (xs, ys, sums), (r, c), (begin, end), (down, across))
        _added(code, record, (i, j), sums)


def _multiplied(
    code: Code,
    multiply: Callable[[Value, Value, Value], Value],
    addresses: tuple[Value, Value, Value],
    place: tuple[Value, Value],
    depths: tuple[Value, Value],
    shape: tuple[int, int],
) -> None:
    """Some columns of x by some vectors of y, over some depths, in registers."""
    (xs, ys, sums), (r, c), (begin, end), (down, across) = addresses, place, depths, shape
    lanes = code.level.lanes
    places = [
        [code.plus(sums, (r, 4 * WIDTH), 4 * WIDTH * a, (c, 4), 4 * lanes * b) for b in range(across)]
        for a in range(down)
    ]
    real = vector(F32, lanes)
    rooms = [[code.variable(real) for _ in row] for row in places]
    for room in (room for row in rooms for room in row):
        code.set(room, splat(F32, lanes, 0.0))
    with code.loop(end, begin) as t:
        line = code.mul(t, code.number(4 * WIDTH))
        y = [
            code.read(vector(I32, lanes), code.plus(ys, line, (c, 4), 4 * lanes * b), 4 * lanes) for b in range(across)
        ]
        for a, row in enumerate(rooms):
            x = code.spread(code.read(I32, code.plus(xs, line, (r, 4), 4 * a), 4), lanes)
            for b, room in enumerate(row):
                code.set(room, multiply(code.get(room), x, y[b]))
    # a chunk is summed by itself first: sums of many tokens lose less that way
    for row, found in zip(places, rooms, strict=True):
        for at, room in zip(row, found, strict=True):
            code.write(code.fadd(code.read(real, at, 4 * lanes), code.get(room)), at, 4 * lanes)


def _dot(code: Code, lanes: int) -> Callable[[Value, Value, Value], Value]:
    """sum + x₀y₀ + x₁y₁ of pairs of bfloat16"""
    pairs = vector(_BFloat(), 2 * lanes)

    def multiply(sum: Value, x: Value, y: Value) -> Value:
        return code.intrinsic(
            f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", sum.type, sum, code.bitcast(x, pairs), code.bitcast(y, pairs)
        )

    return multiply


def _fma(code: Code, lanes: int) -> Callable[[Value, Value, Value], Value]:
    real = vector(F32, lanes)
    return lambda sum, x, y: code.fma(code.bitcast(x, real), code.bitcast(y, real), sum)


def _added(code: Code, record: Value, tile: tuple[Value, Value], sums: Value) -> None:
    """S += what was summed, as far as S reaches."""
    lanes = code.level.lanes
    columns_x, columns_y = code.field(record, Sum.COLUMNS_X), code.field(record, Sum.COLUMNS_Y)
    row, column = (code.mul(at, code.number(WIDTH)) for at in tile)
    width = code.least(code.number(WIDTH), code.sub(columns_y, column))
    whole = code.mul(code.sdiv(width, code.number(lanes)), code.number(lanes))
    with code.loop(code.least(code.number(WIDTH), code.sub(columns_x, row))) as r:
        to = code.plus(code.field(record, Sum.SUM), (code.plus(column, (code.plus(row, r), columns_y)), 4))
        of = code.plus(sums, (r, 4 * WIDTH))
        for kind, begin, end, step in ((vector(F32, lanes), code.number(0), whole, lanes), (F32, whole, width, 1)):
            with code.loop(end, begin, step) as c:
                at = code.plus(to, (c, 4))
                code.write(code.fadd(code.read(kind, at, 4), code.read(kind, code.plus(of, (c, 4)), 4)), at, 4)

"""The small language the generators are written in: llvmlite's builder with loops, vectors and addresses.

Addresses are 64-bit integers; a record is 64-bit integers in a row, whose places an IntEnum names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from llvmlite import ir

from .machine import Level

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID, POINTER = ir.VoidType(), ir.PointerType()
Value = Any  # llvmlite's values and types carry no annotations
Type = Any


def vector(kind: Type, n: int) -> Type:
    return ir.VectorType(kind, n)


def splat(kind: Type, n: int, value: float) -> Value:
    """A constant vector."""
    return ir.Constant(vector(kind, n), [ir.Constant(kind, value)] * n)


class Code:
    """A module under construction, and the function that is being written.  Unknown names are the builder's."""

    def __init__(self, level: Level) -> None:
        self.level, self.module = level, ir.Module("hfquant")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    @contextmanager
    def function(self, name: str, arguments: int, *, exported: bool = True) -> Iterator[Any]:
        """Within: the body of `void name(int64, ...)`; gives the function, whose `args` are values."""
        before = self.__dict__.get("builder")
        made = ir.Function(self.module, ir.FunctionType(VOID, [I64] * arguments), name)
        if not exported:
            made.linkage = "private"
            made.attributes.add("noinline")
        self.builder = ir.IRBuilder(made.append_basic_block("entry"))
        yield made
        self.builder.ret_void()
        if before is not None:
            self.builder = before

    def number(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def plus(self, base: Value, *terms: "Value | int | tuple[Value | int, Value | int]") -> Value:
        """base + terms; a pair stands for its product."""
        for term in terms:
            if isinstance(term, tuple):
                term = self.builder.mul(*(self.number(t) if isinstance(t, int) else t for t in term))
            base = self.builder.add(base, self.number(term) if isinstance(term, int) else term)
        return base

    def read(self, kind: Type, address: Value, align: int = 1) -> Value:
        found = self.builder.load(self.builder.inttoptr(address, POINTER), typ=kind)
        found.align = align
        return found

    def write(self, value: Value, address: Value, align: int = 1) -> None:
        self.builder.store(value, self.builder.inttoptr(address, POINTER)).align = align

    def field(self, record: Value, place: IntEnum) -> Value:
        return self.read(I64, self.plus(record, 8 * int(place)), 8)

    def variable(self, kind: Type, value: Value | None = None) -> Value:
        """Room for a value; `get` and `set` it."""
        with self.builder.goto_entry_block():
            room = self.builder.alloca(kind)
        if value is not None:
            self.builder.store(value, room)
        return room

    def get(self, room: Value) -> Value:
        return self.builder.load(room, typ=room.allocated_type)

    def set(self, room: Value, value: Value) -> None:
        self.builder.store(value, room)

    def room(self, size: int) -> Value:
        """Address of that many bytes on the stack, aligned for vectors."""
        with self.builder.goto_entry_block():
            made = self.builder.alloca(vector(I8, size))
            made.align = 64
        return self.builder.ptrtoint(made, I64)

    @contextmanager
    def loop(self, end: Value, start: Value | None = None, step: int = 1) -> Iterator[Value]:
        """Within: the body for every `start` + k·`step` < `end`."""
        b = self.builder
        head, body, after = (b.append_basic_block(n) for n in ("head", "body", "after"))
        start = self.number(0) if start is None else start
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", i, end), body, after)
        b.position_at_end(body)
        yield i
        i.add_incoming(self.plus(i, step), b.block)
        b.branch(head)
        b.position_at_end(after)

    def cases(self, value: Value, *bodies: Callable[[], None]) -> None:
        """bodies[value]()"""
        b = self.builder
        after = b.append_basic_block("after")
        blocks = [b.append_basic_block("case") for _ in bodies]
        switch = b.switch(value, blocks[-1])
        for i, (block, body) in enumerate(zip(blocks, bodies, strict=True)):
            switch.add_case(self.number(i), block)
            b.position_at_end(block)
            body()
            b.branch(after)
        b.position_at_end(after)

    def nonzero(self, value: Value) -> Value:
        return self.builder.icmp_signed("!=", value, ir.Constant(value.type, 0))

    def least(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def spread(self, scalar: Value, n: int) -> Value:
        """A vector of n times the same."""
        kind = vector(scalar.type, n)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), splat(I32, n, 0))

    def shuffle(self, a: Value, places: Sequence[int], b: Value | None = None) -> Value:
        mask = ir.Constant(vector(I32, len(places)), [ir.Constant(I32, p) for p in places])
        return self.builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if b is None else b, mask)

    def join(self, parts: Sequence[Value]) -> Value:
        """Vectors of one type, a power of two of them, one after the other."""
        while len(parts) > 1:
            n = 2 * parts[0].type.count
            parts = [self.shuffle(a, range(n), b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def intrinsic(self, name: str, returns: Type, *args: Value) -> Value:
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(returns, [a.type for a in args]), name)
        return self.builder.call(found, args)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c"""
        return self.intrinsic(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def call_at(self, address: Value, *args: Value, returns: Type = VOID) -> Value:
        """Call a function by its address."""
        kind = ir.FunctionType(returns, [a.type for a in args])
        pointer = self.builder.inttoptr(address, POINTER)
        return self.builder.call(_Callee(pointer, kind), args)

    def fence(self, values: Sequence[Value]) -> list[Value]:
        """The same values, none of them known before all were computed: the scheduler keeps what comes after behind.

        Left alone, LLVM hoists so much of an unrolled loop that the accumulators no longer fit into the registers.
        """
        kinds = [v.type for v in values]
        one = len(kinds) == 1
        constraint = ",".join(["=x"] * len(kinds) + [str(i) for i in range(len(kinds))] + ["~{memory}"])
        kind = ir.FunctionType(kinds[0] if one else ir.LiteralStructType(kinds), kinds)
        done = self.builder.call(ir.InlineAsm(kind, "", constraint, side_effect=True), values)
        return [done] if one else [self.builder.extract_value(done, i) for i in range(len(kinds))]


class _Callee:
    """A pointer as llvmlite's `call` wants a function."""

    def __init__(self, pointer: Value, kind: Type) -> None:
        self.pointer, self.function_type, self.type = pointer, kind, pointer.type
        self.attributes = ir.values.FunctionAttributes()

    def get_reference(self) -> str:
        return str(self.pointer.get_reference())

"""A weight on its grid and the gradients of it, `_learned.OnGrid`, in generated code: a pass over the weight for each,
where torch takes ten.

    Ŵ = s · (c − z),  c = clip(⌊u⌉, 0, top);    ∂u = s · ∂Ŵ where −½ < u < top + ½, else 0;    ∂s = Σ (c − z) · ∂Ŵ
"""

from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from ..llvm.ir import F32, Code, Value
from ..llvm.lanes import everywhere
from ..llvm.numbers import SIZES, TYPES, typed
from ..llvm.numbers import floats as numbers
from ..llvm.strips import FIRST, FLOATS, Loop, N, clamp, constant, floats, nearest, repeat, scalar


class Place(IntEnum):
    """What the loops are told."""

    U = FIRST  # float32 [out, in]
    S = FIRST + 1  # float32 [out, groups]
    Z = FIRST + 2
    GROUPS = FIRST + 3
    COLUMNS = FIRST + 4  # of a group
    TOP = FIRST + 5
    W = FIRST + 6  # [out, in] of the type: the weight, or its gradient
    DU = FIRST + 7  # float32 [out, in]; this and the next: of the gradients
    DS = FIRST + 8  # float32 [out, groups]


def forward(u: Tensor, s: Tensor, z: Tensor, top: int, dtype: torch.dtype) -> Tensor | None:
    """Ŵ as u is, of that type; None if the code could not be made.  s, z float32 [out, groups, 1]"""
    W = torch.empty_like(u, dtype=dtype)
    return W if _loop("forward", _kind(dtype))(len(u), _record(u, s, z, top) | {Place.W: W}) else None


def backward(u: Tensor, s: Tensor, z: Tensor, top: int, grad: Tensor) -> tuple[Tensor, Tensor] | None:
    """∂u and ∂s of ∂Ŵ."""
    du, ds, grad = torch.empty_like(u), torch.empty_like(s), grad.contiguous()
    record = _record(u, s, z, top) | {Place.W: grad, Place.DU: du, Place.DS: ds}
    return (du, ds) if _loop("backward", _kind(grad.dtype))(len(u), record) else None


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _record(u: Tensor, s: Tensor, z: Tensor, top: int) -> dict[IntEnum, Tensor | int]:
    _, groups, columns = u.shape
    return {
        Place.U: u, Place.S: s.contiguous(), Place.Z: z.contiguous(), Place.GROUPS: groups, Place.COLUMNS: columns,
        Place.TOP: top,
    }  # fmt: skip


@cache
def _loop(which: str, kind: str) -> Loop:
    write = {"forward": _forward, "backward": _backward}[which]
    return Loop(f"on grid {which} {kind}", lambda code, record, row: write(_Row(code, record, row, kind)))


class _Row:
    """Code for one row of a weight.  `group` and `at` are those of a loop under way."""

    def __init__(self, code: Code, record: Value, row: Value, kind: str) -> None:
        self.code, self.record, self.kind, self.size = code, record, kind, SIZES[TYPES.index(kind)]
        self.groups, self.columns = (code.field(record, p) for p in (Place.GROUPS, Place.COLUMNS))
        self.top = code.spread(code.sitofp(code.field(record, Place.TOP), F32), N)
        self._first = code.mul(row, self.groups)

    def group(self, place: Place, g: Value) -> Value:
        """Address of a group's number."""
        return self.code.plus(self.code.field(self.record, place), (self.code.add(self._first, g), 4))

    def columns_of(self, place: Place, g: Value, k: Value, size: int = 4) -> Value:
        """Address of the k-th 16 columns of a group."""
        column = self.code.plus(self.code.mul(self.code.add(self._first, g), self.columns), (k, N))
        return self.code.plus(self.code.field(self.record, place), (column, size))

    def steps(self, u: Value, z: Value) -> Value:
        """c − z"""
        return self.code.fsub(clamp(self.code, nearest(self.code, u), constant(0.0), self.top), z)

    def vectors(self) -> Value:
        return self.code.sdiv(self.columns, self.code.number(N))


def _forward(row: _Row) -> None:
    code = row.code
    with code.loop(row.groups) as g:
        s, z = (scalar(code, row.group(place, g)) for place in (Place.S, Place.Z))

        def one(k: Value) -> None:
            u = floats(code, row.columns_of(Place.U, g, k))
            w = code.fmul(row.steps(u, z), s)
            code.write(typed(code, w, row.kind), row.columns_of(Place.W, g, k, row.size))

        repeat(code, row.vectors(), code.number(0), one)


def _backward(row: _Row) -> None:
    code = row.code
    low, high = constant(-0.5), code.fadd(row.top, constant(0.5))
    with code.loop(row.groups) as g:
        s, z = (scalar(code, row.group(place, g)) for place in (Place.S, Place.Z))
        total = code.variable(FLOATS)
        code.set(total, constant(0.0))

        def one(k: Value) -> None:
            u = floats(code, row.columns_of(Place.U, g, k))
            grad = numbers(code, row.kind, row.columns_of(Place.W, g, k, row.size), N)
            code.set(total, code.fma(row.steps(u, z), grad, code.get(total)))
            inside = code.and_(code.fcmp_ordered(">", u, low), code.fcmp_ordered("<", u, high))
            du = code.select(inside, code.fmul(grad, s), constant(0.0))
            code.write(du, row.columns_of(Place.DU, g, k), 4)

        repeat(code, row.vectors(), code.number(0), one)
        sum_ = everywhere(code, code.get(total), code.fadd)
        code.write(code.extract_element(sum_, code.number(0)), row.group(Place.DS, g), 4)

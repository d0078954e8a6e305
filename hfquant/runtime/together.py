"""Layers that read one tensor, as one call: q, k and v, gate and up.

Found by looking, without names: layers that are called one after the other with the very same tensor, unchanged in
between, and whose weights differ in their rows alone.  From the next call on the first of them multiplies x by the
rows of all, so that x is rounded once and Python is left once; the others take what was made for them.  They check
that theirs is the very same tensor still, and compute by themselves if it is not.

The parameters stay as they are, and so does what is saved.  What kernels made of the weights is copied once into one
piece of memory, of which each layer's own becomes a part, so that it takes no more than before.  What changes,
moves or frees a weight frees what was derived from it, and with that its part in this.

Only where nobody watches (see `nn.direct`), without gradients, and where a kernel is bound to x's shape, of few rows.
HFQUANT_FUSE=0 keeps every layer by itself.
"""

import math
import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cache, kernels
from .reference import Matrix

if TYPE_CHECKING:
    from .llvm.call import Plan

PATIENCE = 3  # calls in a row for which not all results were taken, after which layers are left alone


@dataclass(eq=False)
class Member:
    """One of the layers.  name: as it is told to the user."""

    entry: "weakref.ref[cache.Entry]"
    plan: "Plan"
    bias: Tensor | None
    name: str


@dataclass(eq=False, slots=True)
class Made:
    """What the first layer made for the others: the tensor it read, as it was then, and a result for each of them
    until it is taken."""

    group: "Group"
    x: Tensor
    version: int
    results: list[Tensor | None]
    left: int


class _Thread(threading.local):
    """Of each thread: what the last call made for others, and the last layer that was called for the first time."""

    made: Made | None = None
    read: "weakref.ref[Tensor] | None" = None
    version = 0
    group: "weakref.ref[Group] | None" = None


_HERE = _Thread()
_LOCK = threading.Lock()


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """A layer that is not bound to such an x yet: `kernels.linear`, and from its next call on what is faster."""
    y = kernels.linear(x, matrix, bias)
    bound: kernels.Bound | None = matrix.entry.derived.get(kernels.alone(x))
    if bound is not None and x.is_contiguous() and (bias is None or bias.dtype == x.dtype):
        matrix.entry.derived[kernels.place(x)] = _noted(x, matrix, bias, bound)
    return y


def _noted(x: Tensor, matrix: Matrix, bias: Tensor | None, bound: Any) -> kernels.Bound:
    """What the layer's next call is to run."""
    if not hasattr(bound, "joined") or x.is_inference() or not enabled():
        return bound
    name = f"{matrix.fmt.name} {matrix.encoding} {matrix.shape[0]}x{matrix.shape[1]}"
    member = Member(weakref.ref(matrix.entry), bound, bias, name)
    group = _HERE.group() if _HERE.group is not None else None
    same = group is not None and _HERE.read is not None and _HERE.read() is x and _HERE.version == x._version
    if group is not None and same and (place := group.add(member)) is not None:
        return Other(group, place, member)
    group = Group(member, kernels.place(x))
    _HERE.read, _HERE.version, _HERE.group = weakref.ref(x), x._version, weakref.ref(group)
    return First(group, member)


def enabled() -> bool:
    """Whether the user lets layers share a call."""
    return os.environ.get("HFQUANT_FUSE") != "0"


class Group:
    """Layers with one input.  They are joined when the first is called again."""

    def __init__(self, first: Member, place: Any) -> None:
        self.members, self.place = [first], place
        self.closed = False
        self.plan: Plan | None = None
        self.biases: list[Tensor | None] = []
        self.stamps: list[tuple[int, int]] = []
        self.bias: Tensor | None = None
        self.sizes: list[int] = []
        self.rows = math.prod(first.plan.given[0][:-1])
        self.missed = 0

    def add(self, member: Member) -> int | None:
        """The place of one more among them; None if it has to stay alone."""
        first = self.members[0]
        with _LOCK:
            same = (member.bias is None) == (first.bias is None) and all(
                member.entry() is not other.entry() for other in self.members
            )
            if self.closed or not same or not first.plan.fits(member.plan):
                return None
            self.members.append(member)
            return len(self.members) - 1

    def close(self) -> None:
        """Join what was found so far."""
        with _LOCK:
            if self.closed:
                return
            self.closed = True
            entries = [member.entry() for member in self.members]
            plans = [member.plan for member in self.members]
            made = plans[0].joined(plans[1:]) if len(plans) > 1 and None not in entries else None
            if made is None:
                return
            whole, own = made
            for entry, member, plan in zip(entries, self.members, own, strict=True):
                assert entry is not None
                if plan is not member.plan:
                    member.plan = plan
                    _replace(entry, plan, self)
            self.sizes = [plan.weight.out_features for plan in own]
            self.biases = [member.bias for member in self.members]
            self.stamps = [_stamp(bias) for bias in self.biases]
            self.bias = None if self.biases[0] is None else torch.cat([b for b in self.biases if b is not None])
            self.plan = whole
            if kernels.explains():
                names = " + ".join(member.name for member in self.members)
                kind = str(self.members[0].plan.given[1]).removeprefix("torch.")
                kernels.explain(f"hfquant: {names}, {self.rows} x {kind}: one call, as they read one tensor")

    def given(self, place: int, bias: Tensor | None) -> bool:
        """Whether a layer's bias is the one that was joined, as it was then."""
        return bias is self.biases[place] and (bias is None or _stamp(bias) == self.stamps[place])


class First:
    """The first of the layers: does the work of all."""

    def __init__(self, group: Group, member: Member) -> None:
        self.group, self.member = group, member

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        group = self.group
        if not group.closed:
            group.close()
        before, plan = _HERE.made, group.plan
        if before is not None:
            _missed(before)
        if plan is None or torch.is_grad_enabled() or x.is_inference() or not group.given(0, bias):
            return self.alone(x, bias)
        y = plan(x, group.bias)
        first, *others = torch.split_with_sizes(y, group.sizes, -1)
        if group.rows > 1:  # what a layer returns is contiguous
            first, *others = [part.contiguous() for part in (first, *others)]
        _HERE.made = Made(group, x, x._version, [*others], len(others))
        return first

    def alone(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """This layer by itself, now and, if there is nothing to share, always."""
        if self.group.plan is None and (entry := self.member.entry()) is not None:
            entry.derived[self.group.place] = self.member.plan
        return self.member.plan(x, bias)


class Other:
    """One of the layers behind it."""

    def __init__(self, group: Group, place: int, member: Member) -> None:
        self.group, self.place, self.member = group, place, member

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        made = _HERE.made
        if made is None or made.x is not x or made.group is not self.group or made.version != x._version:
            return self.member.plan(x, bias)
        y, made.results[self.place - 1] = made.results[self.place - 1], None
        if y is None:  # taken already
            return self.member.plan(x, bias)
        made.left -= 1
        if not made.left:
            _HERE.made, self.group.missed = None, 0
        return y if self.group.given(self.place, bias) else self.member.plan(x, bias)


def _missed(made: Made) -> None:
    """Some results were not taken."""
    _HERE.made = None
    made.group.missed += 1
    if made.group.missed == PATIENCE:
        made.group.plan = None
        kernels.explain(f"hfquant: {made.group.members[0].name} by itself again: layers stopped to read what it reads")


def _stamp(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.data_ptr(), bias._version)


def _replace(entry: cache.Entry, plan: "Plan", group: Group) -> None:
    """What was derived of a weight by itself, by its part of what is joined; what other shapes had is found anew."""
    from .kernels import _tiles

    for key, value in list(entry.derived.items()):
        theirs = isinstance(value, (First, Other)) and value.group is not group
        if theirs or key in (_tiles.REAL, _tiles.INTEGER) or isinstance(value, _tiles.plan()):
            del entry.derived[key]
    entry.derived[_tiles.TILES] = plan.weight.held
    entry.derived[_tiles.REAL if plan.weight.tile.real else _tiles.INTEGER] = plan.weight

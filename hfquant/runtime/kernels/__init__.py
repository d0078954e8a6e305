"""Which kernel runs a layer.  One file per kernel; those that do not begin with `_` are asked by rank.

HFQUANT_KERNELS, which is read once, or `with mode(...)`, says which may run:

    auto        all: x may be rounded to 8 bit on the way in (the default)
    exact       those that take x and the weights as they are
    reference   the definition in plain torch
    NAME,NAME   these, in their order; where all refuse, the reference

With HFQUANT_EXPLAIN=1 the first layer of each shape says on stderr which kernel it takes, and why not the others.

A kernel is an object `KERNEL` that satisfies `Kernel`.  It is asked once for each weight, type and number of rows;
what it makes of a weight it keeps with `matrix.derive`.  One whose calls are short may also have a method
`bind(x, matrix) -> Bound | None`: a function for inputs of x's shape and type, which must not refer to the weight's
parts.  It is remembered for few rows, so that nothing at all is decided when it is called again.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import KernelError, ShapeError
from ..reference import Matrix

MODES = ("auto", "exact", "reference")
NAMES = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))
FEW = 64  # rows up to which a kernel is asked for every number of them; beyond, once for each power of two


class Kernel(Protocol):
    """One way to compute a layer, y = x Ŵᵀ + correction + bias (see `extras`)."""

    @property
    def name(self) -> str:
        """The file's."""
        ...

    @property
    def rank(self) -> int:
        """The lowest is asked first; the reference has 100."""
        ...

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded but to the type that x has."""
        ...

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        """Why it does not take x, contiguous [rows > 0, in] in a float type; None if it does.

        May depend on the type, device and rows of x (above `FEW` on their bit_length only), and on the weight's
        encoding, format, shape and device.
        """
        ...

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """[rows, out] in x's dtype.  Raises Unavailable if it cannot run on this machine after all."""
        ...


class Unavailable(Exception):
    """A kernel does not work here: it did not compile, or a library is not what it should be."""


Bound = Callable[[Tensor, Tensor | None], Tensor]  # contiguous x, bias -> y


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a layer, and why those before it do not."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...] = ()


_MODE = ContextVar("hfquant kernels", default=os.environ.get("HFQUANT_KERNELS") or "auto")
_BROKEN: dict[str, str] = {}  # kernels that failed -> why
_EXPLAINED: set[str] = set()


current: Callable[[], str] = _MODE.get  # the mode that holds here and now


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Within, and in this thread: these kernels, whatever HFQUANT_KERNELS says.  KernelError if there are none."""
    allowed(name)
    before = _MODE.set(name)
    try:
        yield
    finally:
        _MODE.reset(before)


@cache
def load(name: str) -> Kernel:
    """The kernel of that name."""
    found: Kernel = importlib.import_module(f"{__name__}.{name}").KERNEL
    return found


@cache
def allowed(mode: str) -> tuple[Kernel, ...]:
    """The kernels that a mode asks, in order; the last one, the reference, takes everything."""
    ranked = sorted(map(load, NAMES), key=lambda kernel: kernel.rank)
    if mode == "auto":
        return tuple(ranked)
    if mode == "exact":
        return tuple(kernel for kernel in ranked if kernel.exact)
    names = mode.split(",")
    for name in names:
        if name not in NAMES:
            close = get_close_matches(name, [*NAMES, *MODES], n=1)
            raise KernelError(
                f"there is no kernel `{name}`",
                f"did you mean `{close[0]}`?" if close else f"choose from {', '.join([*MODES[:2], *NAMES])}",
            )
    return (*(load(name) for name in names if name != "reference"), load("reference"))


def choose(x: Tensor, matrix: Matrix) -> Choice:
    """Ask the kernels in turn.  x [rows, in].  Raises ShapeError if the parts are not those of such a weight."""
    matrix.check()
    refused: list[tuple[str, str]] = []
    for kernel in allowed(current()):
        reason = _BROKEN.get(kernel.name) or kernel.refuses(x, matrix)
        if reason is None:
            choice = Choice(kernel, tuple(refused))
            _explain(x, matrix, choice)
            return choice
        refused.append((kernel.name, reason))
    raise AssertionError("the reference takes everything")


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """A layer.  x [..., in] -> [..., out] in x's dtype"""
    out_features, in_features = matrix.shape
    if x.shape[-1:] != (in_features,) or not x.is_floating_point():
        raise ShapeError(
            f"a layer [{out_features}, {in_features}] was given {x.dtype} {list(x.shape)}",
            f"give it floats of shape [..., {in_features}]",
        )
    count = x.numel() // in_features
    if not count:
        return x.new_zeros(*x.shape[:-1], out_features)
    x = x.contiguous()
    rows, bucket = x.view(-1, in_features), count if count <= FEW else -count.bit_length()
    while True:
        key = (current(), x.dtype, x.device, bucket, len(_BROKEN))
        choice: Choice = matrix.derive(key, lambda: choose(rows, matrix))
        try:
            if count <= FEW and (bind := getattr(choice.kernel, "bind", None)) is not None:
                bound = matrix.derive(alone(x), lambda: bind(x, matrix))
                if bound is not None and (bias is None or bias.dtype == x.dtype):
                    return bound(x, bias)
            return choice.kernel.linear(rows, matrix, bias).view(*x.shape[:-1], out_features)
        except Unavailable as error:
            _disable(choice.kernel, error)


def place(x: Tensor) -> Hashable:
    """The key under which a weight remembers what is bound to x's shape and type, here and now."""
    return current(), torch.get_num_threads(), x.dtype, x.device, x.shape


def alone(x: Tensor) -> Hashable:
    """The key of what is bound to x's shape and type for this weight by itself; under `place` it may share work."""
    return "alone", place(x)


def _disable(kernel: Kernel, error: Exception) -> None:
    _BROKEN[kernel.name] = f"it failed: {error}"
    warnings.warn(f"hfquant: the kernel `{kernel.name}` is not used any more: {error}", RuntimeWarning, stacklevel=3)


def _explain(x: Tensor, matrix: Matrix, choice: Choice) -> None:
    """With HFQUANT_EXPLAIN=1, say once per kind of layer which kernel it takes."""
    if not explains():
        return
    (out_features, in_features), dtype = matrix.shape, str(x.dtype).removeprefix("torch.")
    layer = f"{matrix.fmt.name} {matrix.encoding} {out_features}x{in_features}"
    line = f"hfquant: {layer}, {x.shape[0]} x {dtype}: {choice.kernel.name}"
    refused = "; ".join(f"not {name}: {reason}" for name, reason in choice.refused)
    explain(line + (f" ({refused})" if refused else ""))


def explains() -> bool:
    """Whether the user asked what runs, and why."""
    return os.environ.get("HFQUANT_EXPLAIN") == "1"


def explain(line: str) -> None:
    """Say it on stderr, once, if the user asked."""
    if explains() and line not in _EXPLAINED:
        _EXPLAINED.add(line)
        print(line, file=sys.stderr)

"""The operators, as torch knows them: `hfquant::linear`, `experts`, `embedding` and `weight`.

All take the packed components of a weight in the order of its format, so that one schema serves every format,
width and group size.  Each is one opaque node for torch.compile; inside, the device's kernel runs if it takes
the call, else the reference does.  Their gradients reach x and the bias; packed weights have none.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors import formats
from ..tensors.grid import Grid
from .kernels import cpu
from .reference import dense, unpack

LIBRARY = torch.library.Library("hfquant", "DEF")
_WEIGHT = "Tensor[] parts, str fmt, int bits, int group_size, bool symmetric, int out_features"
LIBRARY.define(f"linear(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"experts(Tensor x, Tensor expert, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"experts_grad(Tensor grad, Tensor expert, {_WEIGHT}, int in_features) -> Tensor")
LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, int in_features, ScalarType dtype) -> Tensor")
LIBRARY.define(f"weight({_WEIGHT}, int in_features, ScalarType dtype) -> Tensor")


def _dense(parts: Sequence[Tensor], fmt: str, grid: Grid, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return dense(unpack(formats.load(fmt), grid, parts, shape), dtype)


def _weight(
    parts: Sequence[Tensor],
    fmt: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [out, in] in `dtype`."""
    return _dense(parts, fmt, Grid(bits, group_size, symmetric), (out_features, in_features), dtype)


def _linear(
    x: Tensor,
    bias: Tensor | None,
    parts: Sequence[Tensor],
    fmt: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
) -> Tensor:
    """x Wᵀ + bias.  x [..., in] -> [..., out] in x's dtype."""
    grid, shape = Grid(bits, group_size, symmetric), (out_features, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    if (y := cpu.linear(x, parts, fmt, grid, shape)) is not None:
        return y if bias is None else y + bias
    return F.linear(x, _dense(parts, fmt, grid, shape, x.dtype), bias)


def _experts(
    x: Tensor,
    expert: Tensor,
    parts: Sequence[Tensor],
    fmt: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
) -> Tensor:
    """Row i of x times the weight of `expert[i]`; zero where there is no such expert (expert parallelism's
    sentinel).

    x [rows, in]; expert int64 [rows]; every part with a leading expert dimension -> [rows, out]
    """
    grid, shape = Grid(bits, group_size, symmetric), (out_features, x.shape[-1])
    y = x.new_zeros(x.shape[0], out_features)
    for e in expert.unique().tolist():
        if not 0 <= e < parts[0].shape[0]:
            continue
        rows = (expert == e).nonzero()[:, 0]
        found = cpu.linear(x[rows], parts, fmt, grid, shape, index=e)
        if found is None:
            found = F.linear(x[rows], _dense([p[e] for p in parts], fmt, grid, shape, x.dtype))
        y[rows] = found
    return y


def _embedding(
    ids: Tensor,
    parts: Sequence[Tensor],
    fmt: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a table [out, in], gathered packed.  ids [...] -> [..., in] in `dtype`."""
    rows = ids.flatten()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < out_features:
        raise IndexError(f"token ids {int(rows.min())}..{int(rows.max())} for a table of {out_features} rows")
    gathered, shape = [part[rows] for part in parts], (rows.shape[0], in_features)
    return _dense(gathered, fmt, Grid(bits, group_size, symmetric), shape, dtype).view(*ids.shape, in_features)


def _experts_grad(
    grad: Tensor,
    expert: Tensor,
    parts: Sequence[Tensor],
    fmt: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    """The gradient [rows, in] of `experts` for that [rows, out] of its output."""
    grid, shape = Grid(bits, group_size, symmetric), (out_features, in_features)
    grad_x = grad.new_zeros(grad.shape[0], in_features)
    for e in expert.unique().tolist():
        if 0 <= e < parts[0].shape[0]:
            rows = (expert == e).nonzero()[:, 0]
            grad_x[rows] = grad[rows] @ _dense([p[e] for p in parts], fmt, grid, shape, grad.dtype)
    return grad_x


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, parts, *ctx.weight = inputs
    ctx.save_for_backward(*parts)
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        W = torch.ops.hfquant.weight(ctx.saved_tensors, *ctx.weight, ctx.in_features, grad.dtype)
        grad_x = grad @ W
    if ctx.needs_input_grad[1]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_bias, [None] * len(ctx.saved_tensors), *[None] * 5


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, expert, parts, *ctx.weight = inputs
    ctx.save_for_backward(expert, *parts)
    ctx.in_features = x.shape[-1]


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    expert, *parts = ctx.saved_tensors
    grad_x = torch.ops.hfquant.experts_grad(grad, expert, parts, *ctx.weight, ctx.in_features)
    return grad_x, None, [None] * len(parts), *[None] * 5


def _register() -> None:
    def fake_linear(x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], *weight: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight[-1])

    def fake_experts(x: Tensor, expert: Tensor, parts: Sequence[Tensor], *weight: Any) -> Tensor:
        return x.new_empty(x.shape[0], weight[-1])

    def fake_weight(parts: Sequence[Tensor], *weight: Any) -> Tensor:
        *_, out_features, in_features, dtype = weight
        return parts[0].new_empty(out_features, in_features, dtype=dtype)

    def fake_embedding(ids: Tensor, parts: Sequence[Tensor], *weight: Any) -> Tensor:
        *_, in_features, dtype = weight
        return ids.new_empty(*ids.shape, in_features, dtype=dtype)

    implementations = {
        "linear": (_linear, fake_linear),
        "experts": (_experts, fake_experts),
        "experts_grad": (_experts_grad, fake_experts),
        "embedding": (_embedding, fake_embedding),
        "weight": (_weight, fake_weight),
    }
    for name, (run, fake) in implementations.items():
        run, fake = cast(Callable[..., Tensor], run), cast(Callable[..., Tensor], fake)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hfquant::{name}", fake, lib=LIBRARY)
    for name, backward, context in (
        ("linear", _linear_backward, _linear_context),
        ("experts", _experts_backward, _experts_context),
    ):
        torch.library.register_autograd(f"hfquant::{name}", backward, setup_context=context, lib=LIBRARY)


_register()

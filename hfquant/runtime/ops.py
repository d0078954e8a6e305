"""The operators, as torch knows them: `hfquant::linear`, `experts`, `embedding` and `weight`.

All take a weight as its packed components in the order of its format, and the encoding as text, so that one schema
serves every format and whatever a layer may have.  Each is one opaque node for torch.compile; inside, `kernels`
chooses who computes it.  Their gradients reach x and the bias, as if activations
were not rounded; packed weights have none.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..tensors import formats
from ..tensors.encoding import Encoding
from .kernels import linear
from .reference import Matrix

LIBRARY = torch.library.Library("hfquant", "DEF")
_WEIGHT = "Tensor[] parts, str fmt, str encoding, int out_features, int in_features"
LIBRARY.define(f"linear(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"experts(Tensor x, Tensor expert, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"experts_grad(Tensor grad, Tensor expert, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"weight({_WEIGHT}, ScalarType dtype) -> Tensor")
# In Python `*weight` is what _WEIGHT says, in that order.


def _matrix(*weight: Any) -> Matrix:
    parts, fmt, encoding, out_features, in_features = weight
    return Matrix(parts, formats.load(fmt), Encoding.parse(encoding), (out_features, in_features))


def _weight(*weight_and_dtype: Any) -> Tensor:
    """The dense weight [out, in] in a dtype, the last argument."""
    *weight, dtype = weight_and_dtype
    return _matrix(*weight).dense(dtype)


def _linear(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """x Wᵀ + bias.  x [..., in] -> [..., out] in x's dtype."""
    return linear(x, _matrix(*weight), bias)


def _experts(x: Tensor, expert: Tensor, *weight: Any) -> Tensor:
    """Row i of x times the weight of `expert[i]`; zero where there is no such expert (expert parallelism's
    sentinel).

    x [rows, in]; expert int64 [rows]; every part with a leading expert dimension -> [rows, out]
    """
    matrix = _matrix(*weight)
    y = x.new_zeros(x.shape[0], matrix.shape[0])
    for rows, one in _by_expert(expert, matrix):
        y[rows] = linear(x[rows], one, None)
    return y


def _experts_grad(grad: Tensor, expert: Tensor, *weight: Any) -> Tensor:
    """The gradient [rows, in] of `experts` for that [rows, out] of its output."""
    matrix = _matrix(*weight)
    grad_x = grad.new_zeros(grad.shape[0], matrix.shape[1])
    for rows, one in _by_expert(expert, matrix):
        grad_x[rows] = grad[rows] @ one.dense(grad.dtype)
    return grad_x


def _by_expert(expert: Tensor, matrix: Matrix) -> list[tuple[Tensor, Matrix]]:
    """The rows of each expert that exists, and its weight."""
    existing = [e for e in expert.unique().tolist() if 0 <= e < matrix.parts[0].shape[0]]
    return [((expert == e).nonzero()[:, 0], replace(matrix, index=e)) for e in existing]


def _embedding(ids: Tensor, *weight_and_dtype: Any) -> Tensor:
    """Rows of a table [out, in], gathered packed.  ids [...] -> [..., in] in `dtype`."""
    *weight, dtype = weight_and_dtype
    table, rows = _matrix(*weight), ids.flatten()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < table.shape[0]:
        raise IndexError(f"token ids {int(rows.min())}..{int(rows.max())} for a table of {table.shape[0]} rows")
    in_features = table.shape[1]
    gathered = replace(table, parts=[part[rows] for part in table.parts], shape=(rows.shape[0], in_features))
    return gathered.dense(dtype).view(*ids.shape, in_features)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, parts, *ctx.weight = inputs
    ctx.save_for_backward(*parts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    parts = ctx.saved_tensors  # read once: where activations are computed again, a second reading is refused
    if ctx.needs_input_grad[0]:
        W = torch.ops.hfquant.weight(parts, *ctx.weight, grad.dtype)
        grad_x = grad @ W
    if ctx.needs_input_grad[1]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_bias, [None] * len(parts), *[None] * len(ctx.weight)


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, expert, parts, *ctx.weight = inputs
    ctx.save_for_backward(expert, *parts)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    expert, *parts = ctx.saved_tensors
    grad_x = torch.ops.hfquant.experts_grad(grad, expert, parts, *ctx.weight)
    return grad_x, None, [None] * len(parts), *[None] * len(ctx.weight)


def _fake_linear(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    torch._check(x.shape[-1] == weight[-1], lambda: f"a layer of {weight[-1]} inputs was given {list(x.shape)}")
    return x.new_empty(*x.shape[:-1], weight[-2])


def _fake_experts(x: Tensor, expert: Tensor, *weight: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight[-2])


def _fake_experts_grad(grad: Tensor, expert: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], weight[-1])


def _fake_weight(parts: Sequence[Tensor], *weight: Any) -> Tensor:
    *_, out_features, in_features, dtype = weight
    return parts[0].new_empty(out_features, in_features, dtype=dtype)


def _fake_embedding(ids: Tensor, *weight: Any) -> Tensor:
    *_, in_features, dtype = weight
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (_linear, _fake_linear),
    "experts": (_experts, _fake_experts),
    "experts_grad": (_experts_grad, _fake_experts_grad),
    "embedding": (_embedding, _fake_embedding),
    "weight": (_weight, _fake_weight),
}
for _name, (_run, _fake) in _IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{_name}", _fake, lib=LIBRARY)
for _name, _backward, _context in (
    ("linear", _linear_backward, _linear_context),
    ("experts", _experts_backward, _experts_context),
):
    torch.library.register_autograd(f"hfquant::{_name}", _backward, setup_context=_context, lib=LIBRARY)

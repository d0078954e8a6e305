"""Tensors that are stored packed and decoded only when an operation asks for their numbers.

One is the `.weight` of a layer whose packed components have other names.  Models ask a layer for `weight.dtype`, PEFT
for its device; both are answered without decoding anything.  PEFT also merges adapters with `weight.data += delta`,
which on a decoded copy would be lost in silence: every in-place operation on a weight is refused.
"""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ..errors import HfquantError


class ReadOnlyWeightError(HfquantError, RuntimeError):
    """Something tried to change the weight of a compressed layer through its decoded copy."""


_Function = Callable[..., Any]
# what a tensor knows of itself without its values
_ATTRIBUTES = (
    "dtype",
    "shape",
    "device",
    "requires_grad",
    "layout",
    "is_meta",
    "is_cuda",
    "is_cpu",
    "grad",
    "grad_fn",
    "is_leaf",
    "ndim",
    "itemsize",
    "nbytes",
)
METADATA: frozenset[_Function] = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.stride]
    + [Tensor.element_size, Tensor.is_contiguous, Tensor.__len__]
)
_SAME: frozenset[_Function] = frozenset([getattr(Tensor, "data").__get__, Tensor.detach])  # noqa: B009
_WRITES = frozenset(["__set__", "__delete__", "__setitem__"])
_WRITES |= {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")}


class View(Tensor):
    """Shape, dtype and device of a tensor; its numbers on use."""

    decode: Callable[[], Tensor]

    @classmethod
    def make(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, decode: Callable[[], Tensor]
    ) -> Self:
        """A view of what `decode` returns."""
        view: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view.decode = decode
        return view

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_decoded(args), **_decoded(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out `cls`
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        return func(*_decoded(args), **_decoded(kwargs or {}))


class WeightView(View):
    """A weight [out, in], read-only: every in-place operation is refused."""

    _is_hf_initialized: bool

    @staticmethod
    def of(
        shape: tuple[int, int], dtype: torch.dtype, device: torch.device, decode: Callable[[], Tensor]
    ) -> "WeightView":
        """A view [out, in] of what `decode` returns."""
        view = WeightView.make(shape, dtype, device, decode)
        view._is_hf_initialized = True  # transformers initialises what does not say that it already is
        return view

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SAME:
            return args[0]  # still read-only: `weight.data += delta` must not pass
        if _written(func, args, kwargs or {}):
            _refuse(func)
        if func is Tensor.__repr__:
            return f"WeightView({tuple(args[0].shape)}, dtype={args[0].dtype}, packed)"
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out `cls`
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            _refuse(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _decoded(value: Any) -> Any:
    """`value` with every view in it replaced by its numbers."""
    if isinstance(value, View):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(v) for v in value)
    if isinstance(value, dict):
        return {key: _decoded(v) for key, v in value.items()}
    return value


def _written(func: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes a view.

    In-place methods end in one underscore; `a += b` and `a.data = b` arrive under their own names.
    """
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _WRITES
    # nn.init passes what it fills by keyword
    target = (args[0] if args else kwargs.get("tensor")) if in_place else kwargs.get("out")
    return isinstance(target, WeightView)


def _refuse(func: _Function) -> NoReturn:
    # no TypeError: torch would take it for "not implemented" and try `a = a + b` for `a += b`
    raise ReadOnlyWeightError(
        f"`{getattr(func, '__name__', func)}` on the weight of a compressed layer: the weight is packed, and a "
        "change of this copy would be lost",
        "call `model.dequantize()` first (for instance before merging an adapter)",
    )

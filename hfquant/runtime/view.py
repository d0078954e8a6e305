"""The `.weight` of a layer whose packed components have other names: dense, read-only, decoded only when used.

Models ask a layer for `weight.dtype`, PEFT for its device; both are answered without decoding anything.  PEFT
also merges adapters with `weight.data += delta`, which on a decoded copy would be lost in silence: every
in-place operation is refused.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

# what a tensor knows of itself without its values
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "shape", "device", "requires_grad", "layout", "is_meta", "is_cuda", "is_cpu", "grad", "ndim")
    if hasattr(getattr(torch.Tensor, name), "__get__")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.stride}


class WeightView(Tensor):
    """Shape, dtype and device of a weight; its values on first use."""

    decode: Callable[[], Tensor]

    @staticmethod
    def of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, decode: Callable[[], Tensor]) -> "WeightView":
        view: WeightView = Tensor._make_wrapper_subclass(WeightView, shape, dtype=dtype, device=device)
        view.decode = decode
        # transformers initialises what does not say that it already is
        view._is_hf_initialized = True
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _writes(name) and args and isinstance(args[0], WeightView) or isinstance(kwargs.get("out"), WeightView):
            _refuse(name)
        if func is Tensor.data.__get__ or func is Tensor.detach:
            return args[0]  # still read-only: `weight.data += delta` must not pass
        plain = [_decoded(arg) for arg in args]
        return func(*plain, **{key: _decoded(value) for key, value in kwargs.items()})

    def __repr__(self, **_: Any) -> str:
        return f"WeightView({tuple(self.shape)}, dtype={self.dtype}, packed)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [_decoded(arg) for arg in args]
        return func(*plain, **{key: _decoded(value) for key, value in (kwargs or {}).items()})


def _decoded(value: Any) -> Any:
    if isinstance(value, WeightView):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(v) for v in value)
    return value


def _writes(name: str) -> bool:
    """In-place methods end in one underscore; `a += b` and `a.data = b` arrive under their own names."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__delete__")


def _refuse(name: str) -> NoReturn:
    raise TypeError(
        f"`{name}` on the weight of a compressed layer: the weight is packed, a change of this copy would be "
        "lost\n\nhint: call `model.dequantize()` first (for instance before merging an adapter)"
    )

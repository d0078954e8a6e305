"""Keys and values on their way from a compressed cache to attention: packed as long as nobody needs them decoded."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .kv_packed import PackedTokens
from .view import METADATA


class StatesView(Tensor):
    """Shape, dtype and device of all keys, or all values; their numbers when an operation asks for them.

    tokens, recent: what `kv_packed.attend` takes, of keys and values alike.
    """

    tokens: PackedTokens
    recent: tuple[Tensor, Tensor]
    decoded: Callable[[], Tensor]

    @staticmethod
    def of(
        tokens: PackedTokens, recent: tuple[Tensor, Tensor], like: Tensor, decode: Callable[[], Tensor]
    ) -> "StatesView":
        """Of all tokens, like these recent ones [batch, heads, n, size]."""
        shape = (*like.shape[:2], tokens.past + like.shape[2], like.shape[3])
        view: StatesView = Tensor._make_wrapper_subclass(StatesView, shape, dtype=like.dtype, device=like.device)
        view.tokens, view.recent, view.decoded = tokens, recent, decode
        return view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
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


def views(tokens: PackedTokens, recent: tuple[Tensor, Tensor]) -> tuple[StatesView, StatesView]:
    """Keys and values, packed ones first."""

    def keys() -> Tensor:
        return torch.cat([tokens.keys(recent[0].dtype), recent[0]], -2)

    def values() -> Tensor:
        return torch.cat([tokens.values(recent[1].dtype), recent[1]], -2)

    return StatesView.of(tokens, recent, recent[0], keys), StatesView.of(tokens, recent, recent[1], values)


def _decoded(value: Any) -> Any:
    """`value` with every view in it replaced by its numbers."""
    if isinstance(value, StatesView):
        return value.decoded()
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(v) for v in value)
    if isinstance(value, dict):
        return {key: _decoded(v) for key, v in value.items()}
    return value

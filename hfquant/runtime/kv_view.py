"""Keys and values on their way from a compressed cache to attention: packed as long as nobody needs them decoded."""

from collections.abc import Callable

import torch
from torch import Tensor

from .kv_packed import PackedTokens
from .view import View


class StatesView(View):
    """All keys, or all values.

    tokens, recent: what `kv_packed.attend` takes, of keys and values alike.
    """

    tokens: PackedTokens
    recent: tuple[Tensor, Tensor]


def views(tokens: PackedTokens, recent: tuple[Tensor, Tensor]) -> tuple[StatesView, StatesView]:
    """Keys and values of all tokens, packed ones first, then these recent ones [batch, heads, n, size]."""
    return _view(tokens, recent, recent[0], tokens.keys), _view(tokens, recent, recent[1], tokens.values)


def _view(
    tokens: PackedTokens, recent: tuple[Tensor, Tensor], states: Tensor, past: Callable[[torch.dtype], Tensor]
) -> StatesView:
    shape = (*states.shape[:2], tokens.past + states.shape[2], states.shape[3])
    view = StatesView.make(shape, states.dtype, states.device, lambda: torch.cat([past(states.dtype), states], -2))
    view.tokens, view.recent = tokens, recent
    return view

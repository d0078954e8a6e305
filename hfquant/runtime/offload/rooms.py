"""KV cache in memory with room for the tokens that will come: a new one is written behind those that are there.

transformers' own layer makes a tensor that is longer by one for every token.  That copies all before it, and what is
copied to is memory that the system has to clear, page by page, which takes longer than the copy.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...memory import anonymous

# bytes of keys or values that have pages of their own, which go back to the system with them: one batch's of one layer,
# in most cases.  Where they share a heap with activations, which come and go, the holes between them take up to a third
# of the cache beyond what is predicted
OWN = 64 << 10
NAMES = ("keys", "values")


class RoomLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [batch, heads, seq, dim] each, in room for `tokens` tokens.

    Where more come, room is made for an eighth more than there are; with `tokens` 0, for what comes, and no more.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        old: Tensor = getattr(self, name)
        have = old.shape[2] if old.numel() else 0
        end = have + new.shape[2]
        room = self._rooms.get(name)
        if room is None or len(room) != len(new) or room.shape[2] < end or (have and not _begins(room, old)):
            room = self._rooms[name] = _pages((*new.shape[:2], self._length(end), new.shape[3]), new.dtype)
            if have:
                room[:, :, :have] = old
        room[:, :, have:end] = new
        return room[:, :, :end]

    def _length(self, end: int) -> int:
        """Tokens to make room for where `end` are needed."""
        return end + end // 8 if 0 < self.tokens < end else max(self.tokens, end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in room of their own: that of the others is free."""
        if not self.is_initialized or self.keys is None or not self.keys.numel():
            return
        for name in NAMES:
            kept = getattr(self, name).index_select(0, indices)
            self._rooms.pop(name, None)
            setattr(self, name, kept[:, :, :0])
            setattr(self, name, self._append(name, kept))

    def reset(self) -> None:
        super().reset()
        self._rooms.clear()


def _begins(room: Tensor, old: Tensor) -> bool:
    """Whether `old` is the first tokens of a room: what was reordered, repeated or moved is elsewhere."""
    return len(old) == len(room) and old.data_ptr() == room.data_ptr() and old.stride() == room.stride()


def _pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is taken page by page as it is written, apart from the heap, in which what stays leaves holes."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < OWN:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(anonymous(nbytes), dtype=torch.uint8).view(dtype).view(shape)

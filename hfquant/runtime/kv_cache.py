"""A KV cache of 8, 4 or 2 bits for transformers' `generate`, with or without offloading.

Keys have a few channels that are large in every token, so they are rounded per channel, over a group of tokens;
values have none, so they are rounded per token, over a group of channels (KIVI; Liu et al., 2024, arXiv:2402.02750).
The newest tokens stay as they are: attention looks at them most, and a group of keys can only be rounded when all of
its tokens are there.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from ..errors import RecipeError
from .kv_encode import NAMES, pack_tokens
from .kv_packed import PackedTokens
from .kv_view import views

BITS = (2, 4, 8)
WINDOW, GROUP = 64, 64  # tokens: see CompressedCache


class CompressedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer: `keys` and `values` hold the newest tokens, the others are packed.

    Every packed tensor is [batch, heads, ., .] and grows along its third dimension.  lazy: what a single new token
    looks at is handed on packed, and decoded where it is used otherwise than by `kv_attention`.  queries: see
    `PackedTokens`; for those that are handed on packed.
    """

    keys: Tensor
    values: Tensor
    packed = NAMES

    def __init__(self, bits: int, window: int, group: int, lazy: bool = False, queries: int | None = None) -> None:
        super().__init__()
        self.bits, self.window, self.group, self.lazy, self.queries = bits, window, group, lazy, queries
        self.past = 0  # tokens that are packed

    def rows(self, name: str, tokens: int) -> int:
        """How long the tensor of that name becomes, at most, for a sequence of `tokens`."""
        if name in ("key_scale", "key_low"):
            return -(-tokens // self.group)
        return tokens if name in self.packed else self.window + self.group

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens [batch, heads, n, d]; returns all, the older ones as they were rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.sizes = key_states.shape[-1], value_states.shape[-1]
        recent = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        full = recent
        if self.past and self.lazy and key_states.shape[-2] == 1:
            full = views(self.tokens, recent)
        elif self.past:
            full = (
                torch.cat([self.tokens.keys(key_states.dtype), recent[0]], -2),
                torch.cat([self.tokens.values(value_states.dtype), recent[1]], -2),
            )
        surplus = recent[0].shape[-2] - self.window
        old = surplus // self.group * self.group if surplus > 0 else 0
        if old:
            self._compress(recent[0][..., :old, :], recent[1][..., :old, :])
            recent = recent[0][..., old:, :].clone(), recent[1][..., old:, :].clone()  # let the old ones go
        self.keys, self.values = recent
        return full

    def _compress(self, keys: Tensor, values: Tensor) -> None:
        """Pack whole groups of tokens."""
        new = pack_tokens(keys, values, self.bits, self.group, self.channels)
        for name, part in zip(self.packed, new, strict=True):
            self._append(name, part)
        self.past += keys.shape[2]

    @property
    def channels(self) -> int:
        """Channels of a value that share a scale: at most a group, and a divisor of all."""
        d = self.sizes[1]
        return max(c for c in range(1, min(d, self.group) + 1) if d % c == 0)

    def _append(self, name: str, new: Tensor) -> None:
        setattr(self, name, torch.cat([getattr(self, name), new], 2) if self.past else new)

    @property
    def tokens(self) -> PackedTokens:
        """The packed ones as they are now; there must be some."""
        parts = {name: getattr(self, name) for name in self.packed}
        return PackedTokens(
            **parts,
            bits=self.bits,
            group=self.group,
            channels=self.channels,
            sizes=self.sizes,
            queries=self.queries,
        )

    def get_seq_length(self) -> int:
        return self.past + (self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0)

    @property
    def nbytes(self) -> int:
        """What this layer takes."""
        names = ("keys", "values", *(self.packed if self.past else ()))
        return sum(getattr(self, name).nbytes for name in names) if self.is_initialized else 0

    def reset(self) -> None:
        super().reset()
        self.past = 0
        for name in self.packed:
            self.__dict__.pop(name, None)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away.  Raises RecipeError if packed ones are among them."""
        if self.is_initialized and -tokens_to_remove > self.keys.shape[-2]:
            raise RecipeError(
                f"a compressed cache cannot take back more than its newest {self.keys.shape[-2]} tokens",
                "use a larger `window`",
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def _each(self, change: Any) -> None:
        if self.is_initialized:
            for name in ("keys", "values", *(self.packed if self.past else ())):
                setattr(self, name, change(getattr(self, name)))


class CompressedCache(DynamicCache):  # type: ignore[misc]
    """For `model.generate(..., past_key_values=CompressedCache(model.config, bits=4))`.

    bits: 8, 4 or 2.  window: how many of the newest tokens stay in full precision, at least; up to `group - 1` more
    wait until their group is full.  group: tokens that share a scale in a channel of keys, and channels (at most)
    that share one in a token's values.  Layers with a sliding window, which is bounded as it is, and cross attention
    stay as they are.  Raises RecipeError for values that make no sense.
    """

    def __init__(self, config: Any, bits: int = 4, window: int = WINDOW, group: int = GROUP) -> None:
        if bits not in BITS:
            raise RecipeError(f"a cache of {bits} bits does not exist", "choose 8, 4 or 2")
        if window < 0 or group < 1:
            raise RecipeError(f"window {window}, group {group}: both count tokens", "use 64 for both")
        super().__init__(config=config)
        self.bits = bits
        compress_layers(self, bits, window, group)

    layers: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes that all layers take."""
        return sum(
            layer.nbytes if isinstance(layer, CompressedLayer) else layer.keys.nbytes + layer.values.nbytes
            for layer in self.layers
            if layer.is_initialized
        )

    @staticmethod
    def for_model(model: Any, bits: int = 4, window: int = WINDOW, group: int = GROUP) -> Cache:
        """The cache that fits a model, an encoder-decoder too."""
        own = CompressedCache(model.config, bits, window, group)
        if not model.config.is_encoder_decoder:
            return own
        return EncoderDecoderCache(own, DynamicCache(config=model.config.get_text_config(decoder=True)))


def compressed_tokens(tokens: float, window: int = WINDOW, group: int = GROUP) -> float:
    """How many of so many tokens are packed; the others stay as they are."""
    return max(0.0, tokens - window) // group * group


def compress_layers(
    cache: DynamicCache, bits: int, window: int, group: int, lazy: bool = False, queries: int | None = None
) -> None:
    """Make an empty cache a compressed one: those of its layers that would keep all tokens as they are."""
    make = partial(CompressedLayer, bits, window, group, lazy, queries)
    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:  # of a cache that was not told of the model, and adds layers
        cache.layer_class_to_replicate = make

"""Launches the kernels of `device.attention`: one query over a compressed KV cache, read packed."""

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from .configs import gpu, options
from .device.attention import merge, packed
from .device.fields import INTERPRETED

if TYPE_CHECKING:
    from ...kv_packed import PackedTokens

LOG2E = math.log2(math.e)
TOKENS = 64  # that a program looks at together; at most a group, so that its keys share their scales
LEAST_ROWS = 16  # queries that a tensor core multiplies at a time


def refuses(size: int, value_size: int, bits: int, group: int, channels: int, queries: int | None = None) -> str | None:
    """Why such a cache is not read packed; None if it is."""
    if group % LEAST_ROWS:
        return f"groups of {group} tokens: not a multiple of {LEAST_ROWS}"
    if channels * bits % 16 or size * bits % 16:
        return f"{channels} channels of {bits} bits do not fill whole words"
    if max(size, value_size) > 256:
        return f"heads of {max(size, value_size)} channels: more than 256"
    if queries is not None and bits != 8:
        return f"queries are rounded for keys of 8 bit, not {bits}"
    return None


def attend(
    query: Tensor,
    layer: "PackedTokens",
    recent: tuple[Tensor, Tensor],
    scale: float,
    mask: Tensor | None = None,
    split: int | None = None,
    asm: bool = True,
) -> Tensor:
    """softmax(scale · q Kᵀ) V for one query of every sequence and head.

    query [batch, query heads, size]; layer: its packed tokens; recent: the keys and values after them, [batch, heads,
    n, size], the query's own included; mask bool [batch, tokens], False where a token must not be looked at.
    Returns [batch, query heads, value size] in the type of the query.
    """
    keys, values = recent
    batch, heads, _, size = keys.shape
    value_size, channels, bits = values.shape[-1], layer.channels, layer.bits
    key_words = layer.key_words.view(torch.int16 if layer.queries is None else torch.int8)
    queries = query.shape[1] // heads
    rows = max(LEAST_ROWS, triton.next_power_of_2(queries))
    past, total = layer.past, layer.past + keys.shape[2]
    tokens = min(TOKENS, layer.group & -layer.group)
    if split is None:
        split = max(1, min(past // (4 * tokens), 2 * gpu(query.device).processors // (batch * heads), 64))
    new: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    o = torch.empty(batch * heads, split, rows, value_size, **new)
    greatest, sums = (torch.empty(batch * heads, split, rows, **new) for _ in range(2))
    y = torch.empty(batch, query.shape[1], value_size, dtype=query.dtype, device=query.device)
    mask = None if mask is None else mask.to(torch.int8).contiguous()
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    scale *= LOG2E
    shape = {"QUERIES": queries, "ROWS": rows, "SIZE": size, "VALUE_SIZE": value_size, "TOKENS": tokens, "SPLIT": split}
    packed[(batch * heads, split)](
        query,
        key_words,
        layer.key_scale,
        layer.key_low,
        layer.value_words.view(torch.int16),
        layer.value_scale,
        layer.value_low,
        mask,
        o,
        greatest,
        sums,
        heads,
        past,
        total,
        scale,
        CHANNELS=channels,
        GROUP=layer.group,
        BITS=bits,
        WORDS=max(16, triton.next_power_of_2(size * bits // 16)),
        VALUE_WORDS=triton.next_power_of_2(channels * bits // 16),
        KEY_STRIDE=key_words.shape[-1],
        VALUE_STRIDE=2 * layer.value_words.shape[-1],
        ROUNDED=layer.queries is not None,
        ASM=asm and not INTERPRETED.value,
        **shape,
        **options(stages=2),
    )
    merge[(batch * heads,)](
        query,
        keys,
        values,
        mask,
        o,
        greatest,
        sums,
        y,
        heads,
        past,
        keys.shape[2],
        total,
        scale,
        WIDTH=max(16, triton.next_power_of_2(size)),
        VALUE_WIDTH=triton.next_power_of_2(value_size),
        **shape,
        **options(stages=2),
    )
    return y

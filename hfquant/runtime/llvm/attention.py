"""One query over a compressed cache, read packed, on CPUs: softmax(q Kᵀ) V, by code that `head` generates."""

import math
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...llvm import numbers
from ...llvm.ir import Code, Value
from ...llvm.strips import Loop, N
from .head import Attend, Head
from .keys import Shape

if TYPE_CHECKING:
    from ..kv_packed import PackedTokens

MOST = 256  # tokens of a group, channels of a head: what the stack holds
QUERIES = 8  # of a head, at most: their sums stay in registers
LOG2E = math.log2(math.e)


def refuses(layer: "PackedTokens", queries: int) -> str | None:
    """Why such a cache is not read packed; None if it is."""
    if layer.sizes[0] % N or layer.channels % N:
        return f"{layer.sizes[0]} channels of keys, {layer.channels} that share a scale: not multiples of {N}"
    if max(*layer.sizes, layer.group) > MOST:
        return f"heads of {max(layer.sizes)} channels, groups of {layer.group} tokens: more than {MOST}"
    return f"{queries} queries of a head: more than {QUERIES}" if queries > QUERIES else None


def attend(
    query: Tensor, layer: "PackedTokens", recent: tuple[Tensor, Tensor], scale: float, mask: Tensor | None
) -> Tensor | None:
    """As `kv_packed.attend`, whose arguments these are; None if the code could not be made."""
    keys, values = (t.contiguous() for t in recent)
    batch, heads, new = keys.shape[:3]
    kind = str(keys.dtype).removeprefix("torch.")
    if kind not in numbers.TYPES or values.dtype != keys.dtype:
        keys, values, kind = keys.float(), values.float(), "float32"
    shape = Shape(
        queries=query.shape[1] // heads,
        size=layer.sizes[0],
        value_size=layer.sizes[1],
        bits=layer.bits,
        group=layer.group,
        channels=layer.channels,
        kind=kind,
        masked=mask is not None,
        rounded=layer.queries is not None,
    )
    q, factor = query.float().contiguous(), torch.tensor([scale * LOG2E])
    y = torch.empty(*query.shape[:2], layer.sizes[1])
    places: dict[IntEnum, Tensor | int] = {
        Attend.QUERY: q, Attend.FACTOR: factor, Attend.KEYS: layer.key_words.contiguous(),
        Attend.KEY_SCALE: layer.key_scale.contiguous(), Attend.KEY_LOW: layer.key_low.contiguous(),
        Attend.VALUES: layer.value_words.contiguous(), Attend.VALUE_SCALE: layer.value_scale.contiguous(),
        Attend.VALUE_LOW: layer.value_low.contiguous(), Attend.PAST: layer.past, Attend.NEW_KEYS: keys,
        Attend.NEW_VALUES: values, Attend.RECENT: new, Attend.MASK: 0 if mask is None else mask.contiguous(),
        Attend.HEADS: heads, Attend.Y: y,
    }  # fmt: skip
    return y.to(query.dtype) if _loop(shape)(batch * heads, places) else None


@cache
def _loop(shape: Shape) -> Loop:
    def body(code: Code, record: Value, strip: Value) -> None:
        Head(code, record, strip, shape).generate()

    return Loop(repr(shape), body)

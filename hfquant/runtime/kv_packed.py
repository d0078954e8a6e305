"""Tokens of a compressed cache, and attention over them by one query: read packed where a kernel does that."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..llvm import refused
from ..tensors.packing import unpack_stream
from .kernels import Unavailable, explain, explains, triton

ROOM = 1 << 20  # codes decoded at a time
_BROKEN: list[str] = []  # why the kernel is not used any more


def unpack(words: Tensor, bits: int, d: int) -> Tensor:
    """int32 [..., ⌈d·bits/32⌉] -> uint8 [..., d]"""
    return unpack_stream(words.reshape(-1, words.shape[-1]), bits, d).view(*words.shape[:-1], d)


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedTokens:
    """Keys [batch, heads, past, sizes[0]] and values [batch, heads, past, sizes[1]], by `kv_encode.pack_tokens`.

    A channel of keys has one scale and minimum for `group` tokens, a token one for `channels` channels of its value.
    queries: the bits to which a query is rounded before it is compared with them, 8; None: it is not.
    """

    key_words: Tensor
    key_scale: Tensor
    key_low: Tensor
    value_words: Tensor
    value_scale: Tensor
    value_low: Tensor
    bits: int
    group: int
    channels: int
    sizes: tuple[int, int]
    queries: int | None = None

    @property
    def past(self) -> int:
        return self.key_words.shape[2]

    def key_codes(self, start: int = 0, end: int | None = None) -> Tensor:
        """uint8 [batch, heads, groups, group, size]; start and end are multiples of a group."""
        return unpack(self.key_words[:, :, start:end], self.bits, self.sizes[0]).unflatten(2, (-1, self.group))

    def value_codes(self, start: int = 0, end: int | None = None) -> Tensor:
        """uint8 [batch, heads, tokens, shares, channels]"""
        codes = unpack(self.value_words[:, :, start:end], self.bits, self.sizes[1])
        return codes.unflatten(3, (-1, self.channels))

    def keys(self, dtype: torch.dtype) -> Tensor:
        """All of them, decoded."""
        keys = self.key_codes() * self.key_scale.unsqueeze(3).float() + self.key_low.unsqueeze(3).float()
        return keys.flatten(2, 3).to(dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """All of them, decoded."""
        values = self.value_codes() * self.value_scale.unsqueeze(4).float() + self.value_low.unsqueeze(4).float()
        return values.flatten(3).to(dtype)


def attend(
    query: Tensor, tokens: PackedTokens, recent: tuple[Tensor, Tensor], scale: float, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale · q Kᵀ) V for one query of every sequence and head, K and V never decoded as a whole.

    Where queries are rounded, q times the keys' scales is: to int8 with one step for a group of tokens, so that its
    products with codes are those of integers.

    query [batch, query heads, size]; recent: the keys and values after the packed ones, [batch, heads, n, size], the
    query's own included; mask bool [batch, past + n], False where a token must not be looked at.  Returns
    [batch, query heads, value size] in the query's type.
    """
    reason, otherwise = _refuses_kernel(query, tokens), _refuses_generated(query, tokens, recent, mask)
    if explains():
        rounded = f", queries in {tokens.queries}" if tokens.queries else ""
        how = "triton" if reason is None else f"generated code (not triton: {reason})"
        if reason and otherwise:
            how = f"torch, a piece at a time (not triton: {reason}; not generated: {otherwise})"
        shape = f"{tokens.sizes[0]} channels, groups of {tokens.group}"
        explain(f"hfquant: one query over keys and values of {tokens.bits} bit{rounded}, {shape}: {how}")
    if reason is None:
        try:
            with triton.launching(query.device):
                from .kernels.triton import attention

                return attention.attend(query, tokens, recent, scale, mask)
        except Unavailable as error:
            _BROKEN.append(f"it failed: {error}")
            warnings.warn(f"hfquant: attention in triton is not used any more: {error}", RuntimeWarning, stacklevel=2)
    if otherwise is None:
        from .llvm import attention as generated

        found = generated.attend(query, tokens, recent, scale, mask)
        if found is not None:
            return found
    return attend_reference(query, tokens, recent, scale, mask)


def _refuses_kernel(query: Tensor, tokens: PackedTokens) -> str | None:
    if reason := triton.refuses_device(query.device.type, query.device.index):
        return reason
    if _BROKEN:
        return _BROKEN[0]
    if tokens.queries is not None:
        return "it takes queries as they are"
    from .kernels.triton import attention

    return attention.refuses(*tokens.sizes, tokens.bits, tokens.group, tokens.channels)


def _refuses_generated(
    query: Tensor, tokens: PackedTokens, recent: tuple[Tensor, Tensor], mask: Tensor | None
) -> str | None:
    if reason := refused(query, tokens.key_words, tokens.value_words, *recent, mask):
        return reason
    from .llvm import attention

    return attention.refuses(tokens, query.shape[1] // recent[0].shape[1])


def attend_reference(
    query: Tensor, tokens: PackedTokens, recent: tuple[Tensor, Tensor], scale: float, mask: Tensor | None = None
) -> Tensor:
    """`attend` in plain torch: what the kernel is compared with.

    Scores and sums in float32, over pieces of at most `ROOM` codes.  Scales are multiplied into the query and into the
    weights of the tokens, not into codes, of which there are more.
    """
    batch, heads, _, size = recent[0].shape
    q = query.float().view(batch, heads, -1, size)
    step = max(1, ROOM // (batch * heads * size * tokens.group)) * tokens.group
    total = _Softmax()
    for start in range(0, tokens.past, step):
        end = min(start + step, tokens.past)
        scores = _scores(q, tokens, start, end) * scale
        total.add(_hide(scores, mask, start), lambda p, a=start, b=end: _mix(p, tokens, a, b))
    newest = _hide(q @ recent[0].float().mT * scale, mask, tokens.past)
    total.add(newest, lambda p: p @ recent[1].float())
    return total.result().flatten(1, 2).to(query.dtype)


class _Softmax:
    """Σ softmax(scores) V over pieces, as they come: numerator and denominator relative to the largest score so far."""

    def __init__(self) -> None:
        self.top: Tensor | None = None
        self.parts: list[Tensor] = []

    def add(self, scores: Tensor, mix: Any) -> None:
        """scores [b, h, q, n]; mix: weights like it -> [b, h, q, value size]"""
        top = scores.amax(-1, keepdim=True)
        top = top if self.top is None else torch.maximum(top, self.top)
        finite = top.masked_fill(top == -torch.inf, 0)  # nothing to look at yet
        weights = (scores - finite).exp()
        new = [mix(weights), weights.sum(-1, keepdim=True)]
        if self.top is not None:
            shrink = (self.top - finite).exp()
            new = [old * shrink + part for old, part in zip(self.parts, new, strict=True)]
        self.top, self.parts = top, new

    def result(self) -> Tensor:
        mixed, weight = self.parts
        return mixed / weight


def _scores(q: Tensor, tokens: PackedTokens, start: int, end: int) -> Tensor:
    """[b, h, queries, size] -> [b, h, queries, end - start]"""
    groups = slice(start // tokens.group, end // tokens.group)
    scale, low = tokens.key_scale[:, :, groups].float(), tokens.key_low[:, :, groups].float()
    scaled, codes = q.unsqueeze(2) * scale.unsqueeze(3), tokens.key_codes(start, end).float()
    step = None if tokens.queries is None else _round_queries(scaled, tokens.queries)
    scores = scaled @ codes.mT  # [b, h, groups, queries, group]; of integers: exact, as all sums are below 2²⁴
    scores = (scores if step is None else scores * step) + (q @ low.mT).mT.unsqueeze(-1)
    return scores.transpose(2, 3).flatten(3)


def _round_queries(scaled: Tensor, bits: int) -> Tensor:
    """Round [..., size] to its codes, in place; returns their steps [..., 1]."""
    top = 2 ** (bits - 1) - 1
    step = scaled.abs().amax(-1, keepdim=True) / top
    step = torch.where(step > 0, step, torch.ones_like(step))
    scaled.div_(step).round_().clamp_(-top, top)
    return step


def _mix(p: Tensor, tokens: PackedTokens, start: int, end: int) -> Tensor:
    """Weights [b, h, queries, end - start] -> [b, h, queries, value size]"""
    scale, low = (t[:, :, start:end].float().mT for t in (tokens.value_scale, tokens.value_low))  # [b, h, shares, n]
    codes = tokens.value_codes(start, end).float().transpose(2, 3)  # [b, h, shares, n, channels]
    mixed = (p.unsqueeze(2) * scale.unsqueeze(3)) @ codes + (p @ low.mT).mT.unsqueeze(-1)
    return mixed.transpose(2, 3).flatten(3)


def _hide(scores: Tensor, mask: Tensor | None, start: int) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask[:, None, None, start : start + scores.shape[-1]], -torch.inf)

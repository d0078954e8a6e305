"""Passes over the calibration, by whoever the passage's crew is: alone as in `observe.py`, or a shard for each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import Weight
from . import observe as alone
from .activations import Stream
from .observe import Group, Onward, Statistics
from .rounding import Ranges
from .shards import Held, Inputs, at_home, spread
from .streaming import Passage

Seen = dict[tuple[Group, int], Statistics]


def observe(
    block: nn.Module,
    passage: Passage,
    index: int,
    groups: Sequence[Group],
    original: Mapping[str, Any],
    experts: Mapping[Group, range],
    further: bool = False,
) -> Seen:
    """As `observe.observe`; the crew's sums are added in the order of the shards.  further: the block runs to its end,
    and what it puts out is `passage.ahead`."""
    ahead = passage.behind(index) if further else None
    if ahead is not None:
        ahead.delete()
    onward = None if ahead is None else ahead.write
    if passage.crew.parts == 1:
        total = alone.observe(block, passage, index, groups, original, experts, onward=onward)
    else:
        total = _sums(block, passage, index, groups, original, experts, onward)
    if ahead is not None:
        passage.ahead = ahead
    return total


def _sums(
    block: nn.Module, passage: Passage, index: int, groups: Sequence[Group], original: Mapping[str, Any],
    experts: Mapping[Group, range], onward: Onward | None,
) -> Seen:  # fmt: skip
    """By a crew."""
    shards, leaders = spread(passage, index), [g.leader for g in groups if g.leader in original]
    shared = passage.crew.keep((block, index, list(groups), dict(experts), leaders, onward is not None))
    parts = zip(shards.handles, *(original[leader].parts for leader in leaders), strict=True)
    total: Seen = {}
    for (at, _), (found, out) in zip(shards.spans, passage.crew.each(_observe, shared, parts), strict=True):
        if onward is not None:
            onward(at, out)
        for key, statistics in found.items():
            total.setdefault(key, Statistics(statistics.in_features)).merge(statistics)
    return total


def _observe(device: str, shared: tuple[Any, ...], passage: Passage, *inputs: Held) -> tuple[Seen, Tensor | None]:
    """-> statistics; and what the block puts out, where that is wanted."""
    block, index, groups, experts, leaders, further = shared
    original = dict(zip(leaders, inputs, strict=True))
    outs: list[Tensor] = []

    def keep(at: int, out: Tensor) -> None:
        outs.append(out.to("cpu", passage.stream.x.dtype))  # type: ignore[attr-defined]

    home = at_home(block, passage, device)
    found = alone.observe(home, passage, index, groups, original, experts, onward=keep if further else None)
    for statistics in found.values():
        statistics.settle()
    return found, torch.cat(outs) if outs else None


def record_original(
    block: nn.Module, passage: Passage, index: int, groups: Sequence[Group], before: Stream, after: Stream
) -> dict[str, Any]:
    """As `observe.record_original`; the inputs stay with the crew."""
    if passage.crew.parts == 1:
        return dict(alone.record_original(block, passage, index, groups, before, after))
    shards = spread(passage, index)
    leaders = [group.leader for group in groups if not group.is_experts]
    shared = passage.crew.keep((block, index, list(groups), leaders))
    parts = zip(shards.handles, shards.of(passage, before), strict=True)
    after.delete()
    kept: dict[str, list[Any]] = {leader: [] for leader in leaders}
    for (at, _), (*inputs, (out, there)) in zip(
        shards.spans, passage.crew.each(_record, shared, parts, stay=len(leaders)), strict=True
    ):
        after.write(at, out)
        for leader, held in zip(leaders, inputs, strict=True):
            if leader in there and leader in kept:
                kept[leader].append(held)
            else:
                kept.pop(leader, None)
    return {leader: Inputs(held) for leader, held in kept.items()}


def _record(device: str, shared: tuple[Any, ...], passage: Passage, before: Held) -> tuple[Any, ...]:
    """-> what every leader reads, None where that is not [batch, ...]; and (output, the leaders that were seen)."""
    block, index, groups, leaders = shared
    seen: dict[str, list[Tensor]] = {}

    def keep(leader: str, at: int, x: Tensor) -> None:
        seen.setdefault(leader, []).append(x.cpu())

    run = alone.run_original(at_home(block, passage, device), passage, index, groups, before, keep)
    outs = [out.to("cpu", before.x.dtype) for _, out in run]
    whole = {leader: x for leader, x in seen.items() if len(x) == len(passage.batches)}
    inputs = [Held(before.at, torch.cat(whole[leader])) if leader in whole else None for leader in leaders]
    return *inputs, (torch.cat(outs), set(whole))


def token_ranges(
    block: nn.Module, passage: Passage, index: int, groups: Sequence[Group], scales: Mapping[Weight, Tensor]
) -> dict[Group, Ranges]:
    """As `observe.token_ranges`."""
    if passage.crew.parts == 1:
        return alone.token_ranges(block, passage, index, groups, scales)
    shared = passage.crew.keep((block, index, list(groups), dict(scales)))
    total: dict[Group, Ranges] = {}
    for found in passage.crew.each(_ranges, shared, zip(spread(passage, index).handles, strict=True)):
        for group, ranges in found.items():
            mine = total.setdefault(group, Ranges())
            mine.low += ranges.low
            mine.high += ranges.high
    return total


def _ranges(device: str, shared: tuple[Any, ...], passage: Passage) -> dict[Group, Ranges]:
    block, index, groups, scales = shared
    return alone.token_ranges(at_home(block, passage, device), passage, index, groups, scales)

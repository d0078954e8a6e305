"""The hidden states before one block, cut into shards that a crew works on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import hidden
from .crew import Crew
from .streaming import Passage


class Held:
    """Some samples of a stream, in memory.  Reads like the stream."""

    def __init__(self, at: int, x: Tensor) -> None:
        self.at, self.x = at, x

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def read(self, at: int, n: int) -> Tensor:
        return self.x[at - self.at : at - self.at + n]


@dataclass
class Inputs:
    """What one layer reads in the original model, in shards that lie with the crew."""

    parts: list[Any]

    def delete(self) -> None:
        self.parts.clear()


def cut(batches: Sequence[tuple[int, int]], parts: int) -> list[range]:
    """Batches that follow each other, in so many shards of about as many samples; no shard is empty."""
    total, ends, done = sum(n for _, n in batches), [0], 0
    for i, (_, n) in enumerate(batches):
        done += n
        if done * parts >= total * len(ends):  # as much as so many shards should have
            ends.append(i + 1)
    return [range(a, b) for a, b in pairwise(ends)]


class Shards:
    """The hidden states before one block: handed to the crew once, used by all that is done with that block."""

    def __init__(self, crew: Crew, passage: Passage, index: int) -> None:
        self.crew, self.index, self.path = crew, index, passage.stream.path
        self.batches = cut(passage.batches, crew.parts)
        self.spans = [span(passage, part) for part in self.batches]
        self.handles = [crew.keep(excerpt(passage, index, part)) for part in self.batches]

    def of(self, passage: Passage, stream: Any) -> list[Any]:
        """Another stream's hidden states before the same block, in the same shards."""
        return [self.crew.keep(Held(at, stream.read(at, n))) for at, n in self.spans]


def span(passage: Passage, part: range) -> tuple[int, int]:
    """(first sample, number of samples) of some batches."""
    first, last = passage.batches[part[0]], passage.batches[part[-1]]
    return first[0], last[0] + last[1] - first[0]


def excerpt(passage: Passage, index: int, part: range) -> Passage:
    """A passage of these batches, before this block alone, that needs no file."""
    at, n = span(passage, part)
    stream: Any = Held(at, passage.stream.read(at, n))
    calls: Any = passage.calls.excerpt(index, part)
    return Passage(passage.stack, calls, stream, [passage.batches[i] for i in part])


def spread(passage: Passage, index: int) -> Shards:
    """The passage's shards before this block; made anew when its hidden states are others."""
    known = passage.shards
    if known is None or (known.index, known.path) != (index, passage.stream.path):
        passage.shards = known = Shards(passage.crew, passage, index)
    return known


def advance(block: nn.Module, passage: Passage, index: int) -> Iterator[tuple[int, Tensor]]:
    """All shards through a block, by the passage's crew: (first sample, what it puts out [n, seq, hidden])."""
    shards = spread(passage, index)
    outputs = passage.crew.each(_outputs, passage.crew.keep((block, index)), zip(shards.handles, strict=True))
    for (at, _), out in zip(shards.spans, outputs, strict=True):
        yield at, out


def _outputs(device: str, shared: tuple[nn.Module, int], passage: Passage) -> Tensor:
    block, index = at_home(shared[0], passage, device), shared[1]
    outs = []
    for batch in range(len(passage.batches)):
        args, kwargs = passage.arguments(index, batch)
        outs.append(hidden(block(*args, **kwargs)).to("cpu", passage.stream.x.dtype))  # type: ignore[attr-defined]
    return torch.cat(outs)


def at_home(block: nn.Module, passage: Passage, device: str) -> nn.Module:
    """A block on a worker's device, and a passage that calls it there."""
    passage.device = device
    return block.to(device)

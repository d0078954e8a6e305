"""The pass forward: the hidden states before every block, kept on disk."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compress.activations import Stream
from ..compress.streaming import Passage, Streamer
from ..memory import give_back
from ..model.skeleton import Skeleton

Watch = Callable[[str, nn.Module, Callable[[], bool]], AbstractContextManager[None]]

TOGETHER = 512  # tokens whose logits are in memory together


@dataclass
class Walk:
    """What the pass forward leaves: each stack's passage, and the hidden states before each of its blocks.

    judged: so many samples, the first, are taken back; from the others, if there are others, layers learn.
    """

    streamer: Streamer
    judged: int
    passages: list[Passage] = field(default_factory=list)
    before: list[list[Stream]] = field(default_factory=list)

    def back(self) -> Iterator[tuple[int, int, int]]:
        """(number, first sample, samples) of the batches that are taken back."""
        return ((i, at, n) for i, (at, n) in enumerate(self.streamer.batches) if at < self.judged)

    def learned(self) -> Iterator[int]:
        """The batches that layers learn from: those that are not taken back, or all where there are no others."""
        return (i for i, (at, _) in enumerate(self.streamer.batches) if self._learns_from(at))

    def learning(self, passage: Passage) -> bool:
        """Whether the batch that a passage is at is one of these."""
        return self._learns_from(passage.now[1])

    def _learns_from(self, at: int) -> bool:
        return self.judged == len(self.streamer.tokens) or at >= self.judged


@torch.no_grad()
def forward(
    skeleton: Skeleton, tokens: Tensor, folder: Path, device: str = "cpu", judged: int | None = None,
    watch: Watch | None = None,
) -> Walk:  # fmt: skip
    """Run the model on tokens [samples, seq], and keep the hidden states before every block in `folder`.

    judged: about how many samples will be taken back, whole batches; all by default, and only then.
    watch(name, block, learning): entered while a block runs; learning() says whether the batch at hand is one that
    layers learn from.
    """
    wanted = len(tokens) if judged is None else min(judged, len(tokens))
    batch = max(1, min(TOGETHER // tokens.shape[1], wanted - 1))  # the first batch is a single sample
    streamer = Streamer(skeleton, tokens, folder, batch, device)
    ends = [at + n for at, n in streamer.batches if wanted == len(tokens) or at + n < len(tokens)]
    walk = Walk(streamer, wanted if wanted == len(tokens) else min(ends, key=lambda end: abs(end - wanted)))
    for passage in walk.streamer.passages():
        states = [passage.stream]
        for i, name in enumerate(passage.stack.blocks):
            block = on(skeleton.load_module(name), device)
            with watch(name, block, partial(walk.learning, passage)) if watch else nullcontext():
                passage.stream = passage.run(block, i, folder / f"{passage.stack.name}.kept.{i + 1:05d}")
            states.append(passage.stream)
            skeleton.drop_module(name)
            give_back()
        walk.passages.append(passage)
        walk.before.append(states)
    return walk


def on(block: nn.Module, device: str) -> nn.Module:
    """The block on that device."""
    if device != "cpu":
        for p in block.parameters():
            p.data = p.data.to(device)
    return block

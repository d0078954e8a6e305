"""The pass forward: the hidden states before every block, kept on disk."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compress.activations import Stream
from ..compress.streaming import Passage, Streamer
from ..memory import give_back
from ..model.skeleton import Skeleton

TOGETHER = 512  # tokens whose logits are in memory together


@dataclass
class Walk:
    """What the pass forward leaves: each stack's passage, and the hidden states before each of its blocks."""

    streamer: Streamer
    passages: list[Passage] = field(default_factory=list)
    before: list[list[Stream]] = field(default_factory=list)


@torch.no_grad()
def forward(skeleton: Skeleton, tokens: Tensor, folder: Path, device: str = "cpu") -> Walk:
    """Run the model on tokens [samples, seq], and keep the hidden states before every block in `folder`."""
    walk = Walk(Streamer(skeleton, tokens, folder, max(1, TOGETHER // tokens.shape[1]), device))
    for passage in walk.streamer.passages():
        states = [passage.stream]
        for i, name in enumerate(passage.stack.blocks):
            block = on(skeleton.load_module(name), device)
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

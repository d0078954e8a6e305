"""A few tokens through a model, one block of it in memory at a time: what stands between its blocks."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..inputs import vocabulary
from ..skeleton import Skeleton

if TYPE_CHECKING:
    from ...compress.streaming import Passage

TOKENS = 32

Look = Callable[["Passage", int, nn.Module], None]


@dataclass
class Run:
    """What a model computes.

    blocks: their names.  states: the stream before each, and after the last [1, tokens, width].
    """

    blocks: list[str]
    states: list[Tensor]
    logits: Tensor


@torch.no_grad()
def run(skeleton: Skeleton, look: Look | None = None) -> Run:
    """Random tokens through all blocks.  look: called with each, loaded, before it runs."""
    from ...compress.streaming import Streamer

    size = vocabulary(skeleton.source.config)
    tokens = torch.randint(0, size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    names, states = list[str](), list[Tensor]()
    with tempfile.TemporaryDirectory(prefix="hfquant-") as work:
        streamer = Streamer(skeleton, tokens, Path(work), 1)
        for passage in streamer.passages():
            for i, name in enumerate(passage.stack.blocks):
                names.append(name)
                states.append(passage.stream.read(0, 1))
                block = skeleton.load_module(name)
                if look is not None:
                    look(passage, i, block)
                passage.stream = passage.run(block, i, Path(work) / f"{passage.stack.name}.{i + 1:05d}")
                skeleton.drop_module(name)
            states.append(passage.stream.read(0, 1))
        (logits,) = streamer.logits()  # to its end, where it drops what it loaded
    return Run(names, states, logits)

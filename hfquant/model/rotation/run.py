"""A few tokens through a model, one block of it in memory at a time: what stands between its blocks."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """What a model computes.  states: by the name of the block, the stream before it [1, tokens, width]; logits."""

    states: dict[str, Tensor] = field(default_factory=dict)
    after: Tensor | None = None
    logits: Tensor | None = None


@torch.no_grad()
def run(skeleton: Skeleton, look: Look | None = None) -> Run:
    """Random tokens through all blocks.  look: called with each, loaded, before it runs."""
    from ...compress.streaming import Streamer

    size = vocabulary(skeleton.source.config)
    tokens = torch.randint(0, size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    found = Run()
    with tempfile.TemporaryDirectory(prefix="hfquant-") as work:
        streamer = Streamer(skeleton, tokens, Path(work), 1)
        for passage in streamer.passages():
            for i, name in enumerate(passage.stack.blocks):
                found.states[name] = passage.stream.read(0, 1)
                block = skeleton.load_module(name)
                if look is not None:
                    look(passage, i, block)
                passage.stream = passage.run(block, i, Path(work) / f"{passage.stack.name}.{i + 1:05d}")
                skeleton.drop_module(name)
            found.after = passage.stream.read(0, 1)
        found.logits = next(streamer.logits())
    return found

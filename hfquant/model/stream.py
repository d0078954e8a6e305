"""The original model's logits with one block of it in memory at a time."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .skeleton import Skeleton
from .source import Source


def stream_logits(
    source: Source, windows: Tensor, *, dtype: torch.dtype, batch: int = 4, folder: Path | None = None
) -> Iterator[Tensor]:
    """Logits of every window, in order.  windows int64 [n, seq] -> [1, seq, vocabulary] each.

    Hidden states lie in `folder`, by default a temporary one.
    """
    from ..compress.streaming import Streamer

    with tempfile.TemporaryDirectory(prefix="hfquant-", dir=folder) as work, torch.no_grad():
        streamer = Streamer(Skeleton(source, dtype), windows, Path(work), batch)
        for passage in streamer.passages():
            for i, name in enumerate(passage.stack.blocks):
                block = streamer.skeleton.load_module(name)
                before = passage.stream
                passage.advance(block, i)
                streamer.skeleton.drop_module(name)
                before.delete()
        for logits in streamer.logits():
            yield from logits.split(1)

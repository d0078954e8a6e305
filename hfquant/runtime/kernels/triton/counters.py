"""Counters for programs that wait for no one: the last to count does what is left.

Kernels leave them at zero.  Launches on one stream follow each other and can share them; streams cannot.  A CUDA graph
has its own, made before it is captured: `with counters(): ...`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MOST = 1 << 14  # programs that count; more of them need not share their work
_OWN: ContextVar[Tensor | None] = ContextVar("hfquant counters", default=None)
_SHARED: dict[tuple[int | None, int], Tensor] = {}


@contextmanager
def counters(device: torch.device) -> Iterator[Tensor]:
    """Within, in this thread: launches on `device` use these, and no others do."""
    own = torch.zeros(MOST, dtype=torch.int32, device=device)
    before = _OWN.set(own)
    try:
        yield own
    finally:
        _OWN.reset(before)


def current(device: torch.device) -> Tensor | None:
    """int32 [MOST], all zero between launches; None in a graph that brought none."""
    own = _OWN.get()
    if own is not None and own.device == device:
        return own
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _SHARED.get((device.index, stream))
    if found is None:
        found = _SHARED[device.index, stream] = torch.zeros(MOST, dtype=torch.int32, device=device)
    return found


def meeting(
    device: torch.device, dtype: torch.dtype, split: int, programs: int, shape: tuple[int, int], join: str
) -> tuple[Tensor | None, Tensor | None, str]:
    """Where the sums of `split` programs meet: memory for them [., *shape], counters, and how (see `device.splits`)."""
    if split == 1:
        return None, None, join
    count = current(device) if join == "last" else None
    if join == "last" and (count is None or programs > count.numel()):
        join = "launch"
    if join == "atomic":
        return torch.zeros(1, *shape, dtype=dtype, device=device), None, join
    return torch.empty(split, *shape, dtype=dtype, device=device), count, join

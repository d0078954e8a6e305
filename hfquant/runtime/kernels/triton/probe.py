"""Whether triton runs here at all: its driver, its compiler, and the one for C that it needs."""

import torch

from .configs import options
from .device.probe import one


def touch(device: torch.device) -> None:
    """Compile and run next to nothing.  Raises what triton raises, RuntimeError if the result is wrong."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    one[(1,)](x, **options())
    if x.item() != 1:
        raise RuntimeError("a kernel ran and changed nothing")

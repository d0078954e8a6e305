"""From buffers in memory to an accelerator, on a stream of its own, while the blocks before still compute.

On a machine without CUDA the same steps are taken with plain copies, which is how the tests run them.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class Upload:
    """Copies weights to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if self.cuda else None

    def start(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Begin copying; returns the copies to be and what says that they are there."""
        with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
            made = {name: t.to(self.device, non_blocking=True, copy=True) for name, t in tensors.items()}
        return made, self.stream.record_event() if self.cuda else None

    def finish(self, made: dict[str, Tensor], event: Any) -> None:
        """Have what computes wait for the copies, and keep their memory until it is done with them."""
        if self.cuda:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(event)
            for tensor in made.values():
                tensor.record_stream(computing)

    def settle(self, event: Any) -> None:
        """Wait until the buffers that were copied may be written again."""
        if event is not None:
            event.synchronize()

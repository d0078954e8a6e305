"""What of a compression is done, what is left, and how long that will take."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Shaped(Protocol):
    """A layer as a plan lists it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def block(self) -> int: ...


class Finished(Protocol):
    """A layer as the engine yields it."""

    @property
    def name(self) -> str: ...
    @property
    def error(self) -> float | None: ...
    @property
    def block(self) -> int: ...
    @property
    def blocks(self) -> int: ...


class Tally:
    """What is done, what is left, and how long that will take.

    Layers that an earlier run finished count as done but tell nothing about this run's speed.
    """

    def __init__(
        self, layers: Mapping[str, Shaped], resumed: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        sizes = {name: math.prod(layer.shape) for name, layer in layers.items()}
        self._left = {name: sizes[name] for name, layer in layers.items() if layer.block >= resumed}
        self._block = {name: layer.block for name, layer in layers.items()}
        self.weights, self._here = sum(sizes.values()), 0
        self._resumed, self._clock, self._start = resumed, clock, clock()
        self._first: int | None = None
        self.layers, self.blocks_done = len(layers), resumed
        self.eta: float | None = None
        self.last: Finished | None = None

    @property
    def weights_done(self) -> int:
        return self.weights - sum(self._left.values())

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start

    @property
    def done(self) -> int:
        """Layers."""
        return self.layers - len(self._left)

    def add(self, layer: Finished) -> bool:
        """Count a layer.  True if it begins a new block."""
        new_block = self.last is not None and layer.block != self.last.block
        weight = self._left.pop(layer.name, 0)
        self.last = layer
        self.blocks_done = max(self.blocks_done, layer.block)
        if layer.block >= self._resumed:
            self._first = layer.block if self._first is None else self._first
            self._here += weight
            if not any(self._block[name] == self._first for name in self._left):  # a whole block has been seen
                self.eta = self.elapsed * sum(self._left.values()) / max(1, self._here)
        return new_block

"""Progress of a compression on stderr: a bar on a terminal, a line per block in a log."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .units import duration


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
            if layer.block != self._first:  # a whole block has been seen
                self.eta = self.elapsed * sum(self._left.values()) / max(1, self._here)
        return new_block

    def __str__(self) -> str:
        """`block 3/30  error 0.0341  left 1 min 20 s`"""
        if self.last is None:
            return "preparing"
        said = [f"block {min(self.last.block + 1, self.last.blocks)}/{self.last.blocks}"]
        if self.last.error is not None:
            said.append(f"error {self.last.error:.3g}")
        if self.eta is not None:
            said.append(f"left {duration(self.eta)}")
        return "  ".join(said)


@contextmanager
def progress(tally: Tally, console: Console) -> Iterator[Callable[[Finished], None]]:
    """Show `tally` while the context lasts; call the result with every finished layer."""
    with _bar(tally, console) if console.is_terminal else _lines(tally, console) as show:
        yield show


@contextmanager
def _bar(tally: Tally, console: Console) -> Iterator[Callable[[Finished], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compressing", total=tally.weights, completed=tally.weights_done, said=str(tally))

        def show(layer: Finished) -> None:
            tally.add(layer)
            name = layer.name if len(layer.name) <= 48 else f"...{layer.name[-45:]}"
            bar.update(task, completed=tally.weights_done, said=f"{tally}  {name}")

        yield show


@contextmanager
def _lines(tally: Tally, console: Console) -> Iterator[Callable[[Finished], None]]:
    line = ""

    def show(layer: Finished) -> None:
        nonlocal line
        if tally.add(layer):
            console.print(line)
        share = tally.weights_done / max(1, tally.weights)
        line = f"{share:4.0%}  {tally}  ({tally.done} of {tally.layers} layers, {duration(tally.elapsed)})"

    yield show
    if line:
        console.print(line)

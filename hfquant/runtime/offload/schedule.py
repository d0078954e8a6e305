"""The zig-zag block schedule: a layer's weights are loaded once and used by many batches, then the next layer's.

Every batch is a run of the model's own `generate`, in a coroutine that is halted before each block.  The schedule
decides which of them goes on: for token, for layer, for batch.  One batch alone is the row-by-row schedule.  What a
model does before, between and after its blocks, how tokens are chosen and when a sequence ends is therefore
transformers' own code, whatever the family.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ...memory import trim
from ...model.blocks import Stack
from .loader import Loader
from .shelf import Shelf

Work = Callable[["Lane"], None]


@dataclass(eq=False)
class Lane:
    """One batch on its way through the model."""

    work: Work
    index: int
    layers: Callable[[int], Sequence[DynamicLayer]] = lambda stage: ()
    stage: int | None = None  # what it waits for
    rng: Tensor | None = None  # the state of torch's generator: draws do not depend on the other batches
    run: Any = field(default=None, repr=False)

    def start(self, seed: int | None) -> None:
        """Go as far as the first block."""
        if seed is not None:
            self.rng = torch.Generator().manual_seed(seed).get_state()
        self.run = greenlet(lambda: self.work(self))
        self.resume()

    def resume(self) -> None:
        """Go on to the next block, or to the end."""
        outer = torch.get_rng_state() if self.rng is not None else None
        if self.rng is not None:
            torch.set_rng_state(self.rng)
        try:
            self.stage = self.run.switch()
        finally:
            if outer is not None:
                self.rng = torch.get_rng_state()
                torch.set_rng_state(outer)

    @property
    def done(self) -> bool:
        return bool(self.run.dead)

    def stop(self) -> None:
        """Leave the model where it stands."""
        if self.run is not None and not self.run.dead:
            self.run.throw()


@dataclass
class Order:
    """Stages in the order of the modules, and which follows which: the last block of a decoder leads to its first.

    stacks: (first stage, number of blocks) of each; the last one is the decoder, which runs again for every token.
    """

    stacks: Sequence[tuple[int, int]]

    @property
    def stages(self) -> int:
        return sum(count for _, count in self.stacks)

    def after(self, stage: int) -> int:
        first, _ = self.stacks[-1]
        return stage + 1 if stage + 1 < self.stages else first


@contextmanager
def halting(model: nn.Module, stacks: Sequence[Stack]) -> Iterator[None]:
    """Within: a block called in a lane first hands its stage to the schedule, and waits to be resumed."""
    names = [name for stack in stacks for name in stack.blocks]
    for stage, name in enumerate(names):
        block = model.get_submodule(name)
        block.forward = _halt(block.forward, stage)
    try:
        yield
    finally:
        for name in names:
            del model.get_submodule(name).forward


def _halt(forward: Callable[..., Any], stage: int) -> Callable[..., Any]:
    def halt(*args: Any, **kwargs: Any) -> Any:
        parent = greenlet.getcurrent().parent
        if parent is not None:
            parent.switch(stage)
        return forward(*args, **kwargs)

    return halt


@torch.no_grad()  # also what every lane finds when it begins, and so what it leaves behind when it ends
def run(
    lanes: Iterator[Lane],
    width: int,
    order: Order,
    loader: Loader,
    shelf: Shelf | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """Take all lanes to their end, `width` at a time; yields the index of each as it ends.

    seed: lane i draws as torch does after `manual_seed(seed + i)`.
    """
    active: list[Lane] = []
    stage, more = 0, True
    try:
        while True:
            while more and len(active) < width:
                more = _begin(lanes, active, seed)
                yield from _ended(active, order, shelf)
            if not active:
                return
            stage = _next(active, stage)
            loader.enter(stage)
            _through([lane for lane in active if lane.stage == stage], stage, order.after(stage), shelf)
            loader.leave(stage)
            trim()
            yield from _ended(active, order, shelf)
            stage += 1
    finally:
        for lane in active:
            lane.stop()


def _begin(lanes: Iterator[Lane], active: list[Lane], seed: int | None) -> bool:
    """Have the next lane join; False if there is none."""
    lane = next(lanes, None)
    if lane is not None:
        lane.start(None if seed is None else seed + lane.index)
        active.append(lane)
    return lane is not None


def _through(here: Sequence[Lane], stage: int, after: int, shelf: Shelf | None) -> None:
    """All lanes that wait for a stage through it.  Behind the last one the first comes again, at the stage after."""
    for lane, following in zip(here, [*here[1:], None], strict=True):
        again = next((one for one in here if not one.done), lane)
        _pass(lane, stage, again.layers(after) if following is None else following.layers(stage), shelf)


def _pass(lane: Lane, stage: int, following: Sequence[DynamicLayer], shelf: Shelf | None) -> None:
    """One lane through one stage, its cache coming and going.  following: what will be needed next."""
    layers = lane.layers(stage)
    if shelf is not None:
        shelf.take(layers)
        shelf.prefetch(following)
    lane.resume()
    if shelf is not None and not lane.done:
        shelf.put(layers)


def _next(active: Sequence[Lane], stage: int) -> int:
    """The first stage from `stage` on, around the end, that some lane waits for."""
    waiting = sorted({lane.stage for lane in active if lane.stage is not None})
    return next((s for s in waiting if s >= stage), waiting[0])


def _ended(active: list[Lane], order: Order, shelf: Shelf | None) -> Iterator[int]:
    """Which lanes have ended.  Not the lanes: whoever gets one holds its cache, which is most of what memory holds."""
    while (at := next((at for at, lane in enumerate(active) if lane.done), None)) is not None:
        index = _leave(active.pop(at), order, shelf)
        gc.collect()  # transformers leaves cycles behind
        yield index


def _leave(lane: Lane, order: Order, shelf: Shelf | None) -> int:
    """Give back what a lane has on disk, for the next ones; returns its index."""
    if shelf is not None:
        for stage in range(order.stages):
            shelf.drop(lane.layers(stage))
    return lane.index

"""What one block of a model costs: measured on the block itself, with the others left out.

A lane of transformers' `generate` is run in which only the first block of the decoder computes; the others hand the
hidden state on.  So masks, rotary tables, the cache and the choice of tokens are the model's own, and no more than one
block's weights are read.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...compress.calls import first_tensor, like
from .batch import Batch, Generation
from .ledger import Ledger

STEPS = 3  # decoding steps that are timed; the fastest counts


@dataclass(frozen=True)
class Step:
    """One pass through the model for one batch.

    block, outside: seconds of a block, and of all else.  held: bytes a lane keeps while it waits for a block.
    work: bytes a block needs beside them while it computes.  outside_work: the same before and after the blocks.
    """

    block: float
    outside: float
    held: int
    work: int
    outside_work: int


@dataclass(frozen=True)
class Probe:
    """A batch of prompts of equal length: the first pass and the following ones.  cache: bytes of one layer's keys
    and values after the first."""

    batch: int
    prompt: int
    prefill: Step
    decode: Step
    cache: int


class _Watch:
    """Stands in the place of the blocks, and measures the first of the decoder."""

    def __init__(self, first: Any, ledger: Ledger | None) -> None:
        self.first, self.ledger, self.pattern = first, ledger, None
        self.block = self.inside = 0.0
        self.held = self.work = self.before = 0

    def __call__(self, forward: Callable[..., Any], is_first: bool, args: Any, kwargs: Any) -> Any:
        if not is_first:
            return like(self.pattern, first_tensor(args, kwargs))
        if self.ledger is not None:
            self.before, self.held = self.ledger.peak, self.ledger.live
            self.ledger.restart()
        start = time.perf_counter()
        self.pattern = forward(*args, **kwargs)
        self.block = time.perf_counter() - start
        if self.ledger is not None:
            self.work = self.ledger.peak - self.held
            self.ledger.restart()
        return self.pattern


@torch.no_grad()
def probe(offloaded: Any, batch: int, prompt: int, memory: bool = True) -> Probe:
    """Measure a batch of that size and length on an `OffloadedModel`.

    memory: count bytes too, in a run of its own, as counting takes time.
    """
    timed = _run(offloaded, batch, prompt, None)
    counted = _run(offloaded, batch, prompt, Ledger()) if memory else timed
    return Probe(
        batch,
        prompt,
        Step(timed[0].block, timed[0].outside, counted[0].held, counted[0].work, counted[0].outside_work),
        Step(timed[1].block, timed[1].outside, counted[1].held, counted[1].work, counted[1].outside_work),
        counted[2],
    )


def _run(offloaded: Any, batch: int, prompt: int, ledger: Ledger | None) -> tuple[Step, Step, int]:
    model, loader = offloaded.model, offloaded.loader
    first = offloaded.order.stacks[-1][0]
    decoder = offloaded.stacks[-1]
    settings = Generation.of(model, {"max_new_tokens": 1 + STEPS, "do_sample": False, "eos_token_id": None})
    ids = torch.randint(5, max(6, min(1000, offloaded.vocabulary)), (batch, prompt))
    prompts = Batch(list(range(batch)), ids, torch.ones_like(ids))
    cache = offloaded._cache()
    watch = _Watch(decoder.blocks[0], ledger)
    blocks = [model.get_submodule(n) for stack in offloaded.stacks for n in stack.blocks]
    for stage, block in enumerate(blocks):
        block.forward = _stub(watch, block.forward, stage, first)
    seen: list[Step] = []
    starts: list[float] = []
    handle = model.register_forward_hook(lambda *_: seen.append(_note(watch, ledger, starts)))
    before = model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    try:
        loader.enter(first)
        if ledger is None:
            list(prompts.generate(model, cache, settings, lambda _: None))
        else:
            with ledger:
                list(prompts.generate(model, cache, settings, lambda _: None))
        loader.leave(first)
    finally:
        handle.remove()
        before.remove()
        for block in blocks:
            del block.forward
    layer = offloaded.cache_layers(cache, first)
    held = sum(t.nbytes for one in layer for t in (one.keys, one.values) if t is not None)
    best = min(seen[1:], key=lambda step: step.block + step.outside)
    return seen[0], best, held * prompt // max(1, prompt + STEPS)


def _note(watch: _Watch, ledger: Ledger | None, starts: list[float]) -> Step:
    outside = time.perf_counter() - starts[-1] - watch.block
    work = 0 if ledger is None else max(0, max(ledger.peak, watch.before) - watch.held)
    return Step(watch.block, outside, watch.held, watch.work, work)


def _stub(watch: _Watch, forward: Callable[..., Any], stage: int, first: int) -> Callable[..., Any]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        if stage < first:  # an encoder's blocks
            return (first_tensor(args, kwargs),)
        return watch(forward, stage == first, args, kwargs)

    return stub

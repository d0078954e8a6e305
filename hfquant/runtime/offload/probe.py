"""What one block of a model costs: measured on the block itself, with the others left out.

A lane of transformers' `generate` is run in which only the first block of the decoder computes; the others hand the
hidden state on.  So masks, rotary tables, the cache and the choice of tokens are the model's own, and no more than one
block's weights are read.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from ...compress.calls import first_tensor, like
from .batch import Batch, Generation
from .clock import computing
from .ledger import Ledger
from .shelf import Shelf

STEPS = 3  # decoding steps that are timed; the middle one counts: in the mean of a run none is as fast as the fastest


@dataclass(frozen=True)
class Step:
    """One pass through the model for one batch.

    block, outside: seconds of a decoder's block, and of all but blocks.  encoder: of an encoder's block.  held: bytes
    a lane keeps while it waits for a block.  work: bytes a block needs beside them while it computes.  outside_work:
    the same before and after the blocks.
    """

    block: float
    outside: float
    held: int
    work: int
    outside_work: int
    encoder: float = 0.0


@dataclass(frozen=True)
class Probe:
    """A batch of prompts of equal length: the first pass and the following ones.

    cache: bytes of one layer's keys and values when the last token came.  token: of one token of one sequence,
    uncompressed.  value: of one number of it.
    """

    batch: int
    prompt: int
    prefill: Step
    decode: Step
    cache: int
    token: int
    value: int


@dataclass(frozen=True)
class Chunk:
    """One of a decoder's blocks for `chunk` tokens of each of `batch` prompts, with `past` tokens before them.

    block: seconds.  held, work: bytes, as of a `Step`; what was in the cache before is in neither.
    """

    batch: int
    chunk: int
    past: int
    block: float
    held: int
    work: int


class _Watch:
    """Stands in the place of the blocks, and measures the first one of every stack."""

    def __init__(self, offloaded: Any, ledger: Ledger | None, around: "Around | None") -> None:
        self.loader, self.ledger, self.around = offloaded.loader, ledger, around
        self.decoder = offloaded.order.stacks[-1][0]
        self.firsts = {first for first, _ in offloaded.order.stacks}
        self.inside: int | None = None
        self.pattern: Any = None
        self.start_over()

    def start_over(self) -> None:
        """For the next pass."""
        self.block = self.encoder = self.apart = 0.0
        self.held = self.work = self.before = 0

    def __call__(self, forward: Callable[..., Any], stage: int, args: Any, kwargs: Any) -> Any:
        if stage not in self.firsts:
            return like(self.pattern, first_tensor(args, kwargs))
        if self.inside != stage:
            self._enter(stage)
        if self.ledger is not None:
            self.before, self.held = self.ledger.peak, self.ledger.live
            self.ledger.restart()
        start = computing()
        if stage == self.decoder and self.around is not None:
            self.around.take()
        self.pattern = forward(*args, **kwargs)
        if stage == self.decoder and self.around is not None:
            self.around.put()
        seconds = computing() - start
        if stage == self.decoder:
            self.block = seconds
        else:
            self.encoder = seconds
        if self.ledger is not None:
            self.work = max(self.work, self.ledger.peak - self.held)
            self.ledger.restart()
        return self.pattern

    def _enter(self, stage: int) -> None:
        start = computing()
        self.leave()
        self.loader.enter(stage)
        self.inside = stage
        self.apart += computing() - start

    def leave(self) -> None:
        if self.inside is not None:
            self.loader.leave(self.inside)
        self.inside = None


class Around:
    """A layer's cache that comes from disk and goes there, as the schedule has it."""

    def __init__(self, shelf: Shelf, layers: Any) -> None:
        self.shelf, self.layers = shelf, layers

    def take(self) -> None:
        self.shelf.take(self.layers)

    def put(self) -> None:
        self.shelf.put(self.layers)


@torch.no_grad()
def probe(offloaded: Any, batch: int, prompt: int, memory: bool = True) -> Probe:
    """Measure a batch of that size and length on an `OffloadedModel`.

    memory: count bytes too, in a run of its own, as counting takes time.
    """
    timed = _Run(offloaded, batch, prompt).go()
    counted = _Run(offloaded, batch, prompt, ledger=Ledger()) if memory else None
    bytes_of = counted.go() if counted is not None else [Step(0, 0, 0, 0, 0)]
    run = counted or _Run(offloaded, 1, 2)
    if counted is None:
        run.go()
    first, later = timed[0], sorted(timed[1:], key=lambda step: step.block + step.outside)[STEPS // 2]
    return Probe(
        batch, prompt, _joined(first, bytes_of[0]), _joined(later, bytes_of[-1]), *run.cache_bytes()
    )  # fmt: skip


def _joined(timed: Step, counted: Step) -> Step:
    return Step(timed.block, timed.outside, counted.held, counted.work, counted.outside_work, timed.encoder)


@torch.no_grad()
def decoding(offloaded: Any, batch: int, context: int, shelved: bool = False) -> float:
    """Seconds of one block for the next token of sequences of `context` tokens, whose cache is made up.

    shelved: with what moving the cache from and to disk costs the thread that computes.
    """
    first = _Run(offloaded, 1, 2)
    first.go()
    run = _Run(offloaded, batch, context, pattern=first.layers(), shelved=shelved)
    return median(step.block for step in run.go()[1:])  # the first of a new size is slow


@torch.no_grad()
def chunk(offloaded: Any, batch: int, tokens: int, past: int) -> Chunk:
    """Measure some tokens of prompts whose `past` tokens before them are made up: time, then bytes."""
    first = _Run(offloaded, 1, 2)
    first.go(steps=0)
    pattern = first.layers()
    runs = [
        _Run(offloaded, batch, past, ledger=ledger, pattern=pattern, more=tokens) for ledger in (None, None, Ledger())
    ]
    timed, again, counted = (run.go(steps=0)[0] for run in runs)
    return Chunk(
        batch, tokens, past, min(timed.block, again.block), counted.held, max(counted.work, counted.outside_work)
    )  # fmt: skip


class _Run:
    """One lane.  pattern: layers of a cache like those to be made up; more: tokens that come after those."""

    def __init__(
        self, offloaded: Any, batch: int, prompt: int, *, ledger: Ledger | None = None, pattern: Any = None,
        shelved: bool = False, more: int = 1,
    ) -> None:  # fmt: skip
        self.offloaded, self.batch, self.prompt, self.ledger = offloaded, batch, prompt, ledger
        # bytes are counted, and files filled, with a cache that is made anew for every token
        plain = ledger is not None or shelved
        self.cache = offloaded._cache(None if plain else prompt + more + STEPS)
        if pattern is not None:
            self._make_up(pattern)
        self.shelved, self.more = shelved, more
        self.starts: list[float] = []
        self.seen: list[Step] = []

    def layers(self) -> list[Any]:
        return list(self.offloaded.cache_layers(self.cache, self.offloaded.order.stacks[-1][0]))

    def cache_bytes(self) -> tuple[int, int, int]:
        """Of one layer when the last token came, of one token of one sequence in full, and of one number."""
        layers = [layer for layer in self.layers() if layer.is_initialized]
        held = sum(getattr(layer, "nbytes", layer.keys.nbytes + layer.values.nbytes) for layer in layers)
        tokens = sum(layer.get_seq_length() for layer in layers)
        token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (layers[0].keys, layers[0].values))
        return held * (tokens - 1) // tokens, token, layers[0].keys.element_size()

    def _make_up(self, pattern: Any) -> None:
        for layer, like_this in zip(self.layers(), pattern, strict=True):
            made = [
                torch.randn(self.batch, t.shape[1], self.prompt, t.shape[3]).to(t.dtype)
                for t in (like_this.keys, like_this.values)
            ]
            layer.update(*made)

    def go(self, steps: int = STEPS) -> list[Step]:
        """The first pass and so many following ones."""
        offloaded, model = self.offloaded, self.offloaded.model
        settings = Generation.of(model, {"max_new_tokens": 1 + steps, "do_sample": False, "eos_token_id": None})
        made_up = bool(self.layers() and self.layers()[0].is_initialized)
        long = self.prompt + (self.more if made_up else 0)
        ids = torch.randint(5, max(6, min(1000, offloaded.vocabulary)), (self.batch, long))
        prompts = Batch(list(range(self.batch)), ids, torch.ones_like(ids))
        shelf = Shelf(offloaded.scratch, long + steps) if self.shelved else None
        around = Around(shelf, self.layers()) if shelf is not None else None
        if around is not None:
            around.put()
        watch = _Watch(offloaded, self.ledger, around)
        blocks = [model.get_submodule(n) for stack in offloaded.stacks for n in stack.blocks]
        for stage, block in enumerate(blocks):
            block.forward = partial(_stand_in, watch, block.forward, stage)
        handle = model.register_forward_hook(lambda *_: self.seen.append(self._note(watch)))
        before = model.register_forward_pre_hook(lambda *_: self.starts.append(computing()))
        try:
            with self.ledger or nullcontext():
                list(prompts.generate(model, self.cache, settings, lambda _: None))
        finally:
            watch.leave()
            if shelf is not None:
                shelf.close()
            handle.remove()
            before.remove()
            for block in blocks:
                del block.forward
        return self.seen

    def _note(self, watch: _Watch) -> Step:
        outside = computing() - self.starts[-1] - watch.block - watch.encoder - watch.apart
        work = 0 if self.ledger is None else max(0, max(self.ledger.peak, watch.before) - watch.held)
        step = Step(watch.block, max(0.0, outside), watch.held, max(watch.work, 0), work, watch.encoder)
        watch.start_over()
        return step


def _stand_in(watch: _Watch, forward: Callable[..., Any], stage: int, *args: Any, **kwargs: Any) -> Any:
    return watch(forward, stage, args, kwargs)

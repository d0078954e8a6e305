"""What the cost model is told of one model on one machine."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch

from .clock import computing, undisturbed
from .loader import Loader
from .probe import Chunk, Probe, chunk, decoding, probe

LONGEST = 256  # tokens of a prompt that is measured; longer ones follow the fit
SHORT = 4  # tokens of the prompts of a large batch
FAR = 64  # tokens before the next one, at least, to tell what they cost
WIDE = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # batches
PATIENCE = 2.0  # seconds of a measurement after which no larger one is made
READS = 5  # stages that are read to know the disk


@dataclass(frozen=True)
class Feed:
    """Of reading weights, per byte as stored.

    seconds: until it is where it is computed with.  cpu: seconds of a processor.  drag: seconds that computing takes
    longer meanwhile, as both use the same memory.
    """

    seconds: float
    cpu: float
    drag: float = 0.0


@dataclass(frozen=True)
class Measured:
    """probes: of prompts.  contexts: (batch, tokens before, seconds of a block for the next one).  shelved: the same
    with a cache that comes from disk and goes there, None if that was not measured.  chunks: of parts of prompts, none
    where prompts are not cut."""

    probes: Sequence[Probe]
    contexts: Sequence[tuple[int, int, float]]
    feed: Feed
    shelved: tuple[int, int, float] | None = None
    chunks: Sequence[Chunk] = ()


def measure(offloaded: Any, prompts: int, prompt: int, room: int) -> Measured:
    """Run one block of an open model with batches of several sizes.

    prompts, prompt: how many there will be, of how many tokens.  room: bytes that activations may take.
    """
    long = max(2, min(prompt, LONGEST))
    short, context = min(SHORT, long), max(long, FAR)
    probes = [probe(offloaded, 1, long), probe(offloaded, 2, long), probe(offloaded, 4, short)]
    per_token = max((p.prefill.held + p.prefill.work + p.cache) / (p.batch * p.prompt) for p in probes)
    contexts: list[tuple[int, int, float]] = []
    decoder_only = not offloaded.config.is_encoder_decoder
    for batch in WIDE:  # 4 is there, but without a long context
        if batch > max(1, prompts) or batch * short * per_token > room:
            break
        start = undisturbed()
        probes.append(probe(offloaded, batch, short, memory=False))
        if decoder_only and batch * context * probes[0].token * 4 <= room:
            contexts.append((batch, context, decoding(offloaded, batch, context)))
        if undisturbed() - start > PATIENCE:
            break
    shelved = None
    if contexts:
        batch, context, _ = contexts[len(contexts) // 2]
        shelved = batch, context, decoding(offloaded, batch, context, shelved=True)
    chunks = _chunks(offloaded, max(1, prompts), long, room, per_token) if decoder_only else []
    return Measured(probes, contexts, measure_feed(offloaded.loader), shelved, chunks)


def _chunks(offloaded: Any, prompts: int, long: int, room: int, per_token: float) -> list[Chunk]:
    """Parts of prompts of `long` tokens: few and more, of few prompts and more, with a short past and a long one."""
    found = []
    for batch, tokens, past in ((4, 4, long), (16, 4, long // 2), (16, 8, long), (4, 16, long)):
        batch = min(batch, prompts)
        if past >= SHORT and batch * (tokens + past) * per_token <= room:
            found.append(chunk(offloaded, batch, tokens, past))
    return found


def measure_feed(loader: Loader) -> Feed:
    """Read some stages as they are read in earnest, and compute beside it."""
    read = [loader.try_out(stage % len(loader.stages)) for stage in range(READS)]
    seconds, processor = ([one[i] / one[0] for one in read] for i in (1, 2))
    return Feed(sorted(seconds)[READS // 2], sorted(processor)[READS // 2], _drag(loader))


def _drag(loader: Loader) -> float:
    """Seconds that computing takes longer per byte that is read meanwhile."""
    a, b = torch.randn(32, 1024), torch.randn(1024, 2048)  # beyond the nearest caches

    def work() -> float:
        start = computing()
        for _ in range(8):
            a @ b
        return computing() - start

    work()
    alone = min(work() for _ in range(3))
    over = Event()

    def go_on() -> tuple[int, float]:
        nbytes, seconds, stage = 0, 0.0, 0
        while not (over.is_set() and nbytes):
            more, spent, _ = loader.try_out(stage % len(loader.stages))
            nbytes, seconds, stage = nbytes + more, seconds + spent, stage + 1
        return nbytes, seconds

    with ThreadPoolExecutor(1, thread_name_prefix="hfquant-beside") as pool:
        reading = pool.submit(go_on)
        try:
            times = [work() for _ in range(5)]
        finally:
            over.set()  # whatever happens here: the thread would go on for ever
        nbytes, seconds = reading.result()
    slower = sorted(times)[len(times) // 2] / alone - 1  # seconds more per second of computing
    return max(0.0, slower) * seconds / nbytes

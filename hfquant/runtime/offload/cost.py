"""The cost model: seconds and bytes of a policy, from what one block was measured to need.

For one pass of a block of batches through all layers, as in the paper, every resource is busy for its own sum and the
slowest decides.  Reading also slows down computing, as both use the same memory, and takes its share of the processors:

    T = max(compute + drag · read, disk, (compute · threads + processor seconds of reading) / cores)

The first pass fills the cache, each following one reads it and adds a token.  Where prompts pass in chunks the first
pass is as many: each reads the weights, and what of the cache the chunks before it have filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..kv_cache import compressed_tokens
from .fit import Curve, Line
from .hardware import Hardware
from .measured import FAR, Measured
from .pieces import Piece
from .placement import Placement
from .policy import Policy
from .probe import Chunk

REWRITTEN = 4  # copies of one layer's cache on its way: read ahead, read, joined with the new token, being written


@dataclass(frozen=True)
class Workload:
    """prompts of `prompt` tokens, each going on for `new` tokens."""

    prompts: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Pass:
    """One pass of a block of batches through the model, in seconds of each resource."""

    compute: float
    disk: float
    processor: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.disk, self.processor)

    @property
    def bottleneck(self) -> str:
        names = {"compute": self.compute, "disk": self.disk, "processor": self.processor}
        return max(names, key=lambda name: names[name])


@dataclass(frozen=True)
class Prediction:
    """What a policy will take.

    start: seconds until what stays in memory is there.  prefill: the first pass of a block; decode: the mean following
    one, `new` - 1 times.  seconds: of everything.  latency: of one block of prompts.  peak: bytes of the process at
    most; disk: bytes of temporary files.
    """

    start: float
    prefill: Pass
    decode: Pass
    seconds: float
    tokens_per_second: float
    latency: float
    peak: int
    disk: int
    new: int = 1

    @property
    def bottleneck(self) -> str:
        """Of the passes that take longest in sum: the first, or those that follow."""
        later = (self.new - 1) * self.decode.seconds
        return (self.decode if later > self.prefill.seconds else self.prefill).bottleneck


class CostModel:
    """Predicts policies for one model on one machine."""

    def __init__(
        self,
        hardware: Hardware,
        measured: Measured,
        pieces: Sequence[Sequence[Piece]],
        decoder: int,
        base: int,
        appends: bool = False,
    ) -> None:
        """decoder: how many of the stages are its blocks.  base: bytes of the process before anything is placed.
        appends: of a cache that goes to disk only new tokens are written, but where sequences leave a batch."""
        self.hardware, self.layers, self.base, self.feed = hardware, decoder, base, measured.feed
        self.appends = appends
        self.encoders = len(pieces) - decoder
        self.place = Placement(pieces)
        self.threads = torch.get_num_threads()
        self._fit_seconds(measured)
        self._fit_bytes(measured)

    def _fit_seconds(self, measured: Measured) -> None:
        probes = measured.probes
        shortest = min(p.prompt for p in probes)
        wide = [p for p in probes if p.prompt == shortest]
        self.encode = Curve((p.batch * p.prompt, p.prefill.encoder) for p in probes)
        rows = Curve((p.batch * p.prompt, p.prefill.block) for p in wide)
        long = [p for p in probes if p.prompt > shortest and p.batch * p.prompt <= rows.x[-1]]
        over = [max(0.0, p.prefill.block - rows(p.batch * p.prompt)) / (p.batch * p.prompt**2) for p in long]
        self.square = min(over, default=0.0)  # attention of a prompt to itself
        self.rows = Curve(
            (p.batch * p.prompt, p.prefill.block - self.square * p.batch * p.prompt**2) for p in [*wide, *probes]
        )
        self.batch = Curve((p.batch, p.decode.block) for p in wide)
        self.shortest = shortest
        after = [*measured.contexts] or [(p.batch, p.prompt, p.decode.block) for p in probes if p.prompt >= FAR]
        more = [(b * (n - shortest), max(0.0, s - self.batch(b))) for b, n, s in after]
        self.context = Curve([(0.0, 0.0), *more])
        first = [(1.0, p.batch * p.prompt) for p in probes]
        self.around_prefill = Line(first, [p.prefill.outside for p in probes])
        self.around_decode = Curve((p.batch, p.decode.outside) for p in wide)
        self.cuts = bool(measured.chunks)
        self.past = _beyond(measured.chunks, [(c.block, self.prefill(c.batch, c.chunk)) for c in measured.chunks])
        self.shelving = 0.0
        if measured.shelved is not None:
            batch, tokens, seconds = measured.shelved
            self.shelving = max(0.0, seconds - self.decode(batch, tokens)) / (batch * tokens)

    def _fit_bytes(self, measured: Measured) -> None:
        counted = [p for p in measured.probes if p.prefill.held]
        first = [(1.0, p.batch * p.prompt, p.batch * p.prompt**2) for p in counted]
        self.held = Line(first, [p.prefill.held for p in counted])
        self.work = Line(first, [max(p.prefill.work, p.prefill.outside_work) for p in counted])
        later = [(1.0, p.batch, p.batch * p.prompt) for p in counted]
        self.held_later = Line(later, [max(0, p.decode.held - p.cache) for p in counted])
        self.work_later = Line(later, [max(p.decode.work, p.decode.outside_work) for p in counted])
        self.token, self.value = max((p.token, p.value) for p in counted)
        rows = [(1.0, c.batch * c.chunk, c.batch * c.chunk**2) for c in measured.chunks]
        chunks = list(zip(measured.chunks, rows, strict=True))
        self.held_past = _beyond(measured.chunks, [(c.held, self.held(*row)) for c, row in chunks])
        self.work_past = _beyond(measured.chunks, [(c.work, self.work(*row)) for c, row in chunks])

    def prefill(self, batch: float, prompt: float) -> float:
        """Seconds of one of the decoder's blocks for a batch of prompts."""
        return self.rows(batch * prompt) + self.square * batch * prompt**2

    def chunked(self, batch: float, chunk: float, past: float) -> float:
        """Seconds of one block for the next `chunk` tokens of prompts, `past` of each being in the cache."""
        return self.prefill(batch, chunk) + self.past(batch * past, batch * chunk * past)

    def decode(self, batch: float, context: float) -> float:
        """Seconds of one block for the next token of a batch, `context` tokens being there."""
        return self.batch(batch) + self.context(batch * max(0.0, context - self.shortest))

    def cache(self, batch: int, tokens: float, bits: int = 16) -> float:
        """Bytes of one layer's cache of one batch."""
        packed = compressed_tokens(tokens) if bits < 16 else 0.0
        return batch * self.token * (tokens - packed + packed * (bits + 0.5) / (8 * self.value))

    def predict(self, policy: Policy, work: Workload) -> Prediction:
        """Seconds and bytes of a whole workload."""
        policy = fitted(policy, work)
        placed = self.place(policy.weights)
        first, later = self.passes(policy, work, placed.streamed, placed.streamed_again(self.encoders))
        latency = first.seconds + (work.new - 1) * later.seconds
        start = placed.read_once * self.feed.seconds
        seconds = start + work.prompts // policy.block * latency
        if rest := work.prompts % policy.block:
            last = fitted(policy, replace(work, prompts=rest))
            a, b = self.passes(last, work, placed.streamed, placed.streamed_again(self.encoders))
            seconds += a.seconds + (work.new - 1) * b.seconds
        return Prediction(
            start, first, later, seconds, work.prompts * work.new / seconds, latency,
            self.peak(policy, work), self.disk(policy, work), work.new,
        )  # fmt: skip

    def passes(self, policy: Policy, work: Workload, streamed: float, again: float) -> tuple[Pass, Pass]:
        """The first pass, and the mean of the following ones; `streamed` bytes of weights are read in the first and
        `again` in each of the others."""
        b, n, s, bits = policy.batch, policy.batches, work.prompt, policy.cache_bits
        context = s + work.new / 2
        on_disk = min(policy.cache_on_disk, self.layers) * n
        parts = self._parts(policy, s)
        compute = n * self.encoders * self.encode(b * s) + n * sum(
            self.layers * self.chunked(b, c, past) + self.around_prefill(1, b * c) for past, c in parts
        )
        compute += on_disk * self.shelving * b * sum(past + c for past, c in parts)
        before, stored = on_disk * sum(self.cache(b, past, bits) for past, _ in parts), on_disk * self.cache(b, s, bits)
        first = self._pass(policy, compute, streamed + (len(parts) - 1) * again, before, stored)
        compute = n * (self.layers * self.decode(b, context) + self.around_decode(b))
        compute += on_disk * self.shelving * b * context
        moved, stored = on_disk * self.cache(b, context, bits), on_disk * self.cache(b, 1)
        return first, self._pass(policy, compute, again, moved, stored)

    def _parts(self, policy: Policy, prompt: int) -> list[tuple[int, int]]:
        """(tokens before it, tokens) of every chunk of a prompt; an encoder's is whole."""
        chunk = policy.even_chunk(prompt) if not self.encoders else None
        return [(at, min(chunk, prompt - at)) for at in range(0, prompt, chunk)] if chunk else [(0, prompt)]

    def _pass(self, policy: Policy, compute: float, weights: float, read: float, written: float) -> Pass:
        """weights, read, written: bytes of weights, and of the cache."""
        hardware = self.hardware
        disk = weights * self.feed.seconds + read / hardware.disk_read + written / hardware.disk_write
        if policy.depth == 0:  # one after the other
            return Pass(compute, disk, compute + disk)
        reading = weights * self.feed.cpu + read / hardware.disk_read * hardware.read_cpu
        processor = (compute * self.threads + reading) / max(1, hardware.cores)
        return Pass(compute + weights * self.feed.drag, disk, processor)

    def peak(self, policy: Policy, work: Workload) -> int:
        """Bytes of the process at most: the largest moment of the first pass, or of the last."""
        placed = self.place(policy.weights)
        ring = min(policy.depth + 1, placed.busy) * placed.largest
        return int(self.base + placed.kept + ring + self.lanes(policy, work))

    def lanes(self, policy: Policy, work: Workload) -> float:
        """Bytes of everything but weights."""
        b, n, s = policy.batch, policy.batches, work.prompt
        end, bits = s + work.new, policy.cache_bits
        here = (self.layers - min(policy.cache_on_disk, self.layers)) * n
        past, c = self._parts(policy, s)[-1]  # the last but one may be larger, and has less before it
        if past:
            c = policy.even_chunk(s) or c
        grown = b * past, b * c * past
        first = n * (self.held(1, b * c, b * c * c) + self.held_past(*grown))
        first += self.work(1, b * c, b * c * c) + self.work_past(*grown)
        later = n * self.held_later(1, b, b * end) + self.work_later(1, b, b * end)
        return max(
            first + here * self.cache(b, s, bits) + self._flying(policy, past, c),
            later + here * self.cache(b, end, bits) + self._flying(policy, end - 1, 1),
        )

    def _flying(self, policy: Policy, past: int, new: int) -> float:
        """Bytes of the cache on its way to and from disk, at most, while a block adds `new` tokens to `past`.

        The layer that runs, half of it again while keys, or values, are joined with the new ones, the one that is read
        ahead, and twice what is new: being written, and before it.
        """
        if not policy.cache_on_disk:
            return 0.0
        if not self.appends or policy.cache_bits < 16:
            return REWRITTEN * self.cache(policy.batch, past + new)
        return 2.5 * self.cache(policy.batch, past) + 2 * self.cache(policy.batch, new)

    def disk(self, policy: Policy, work: Workload) -> int:
        """Bytes of temporary files for the cache."""
        layers = min(policy.cache_on_disk, self.layers) * policy.batches
        return int(layers * self.cache(policy.batch, work.prompt + work.new, policy.cache_bits))


def fitted(policy: Policy, work: Workload) -> Policy:
    """The policy without room for prompts that are not there."""
    batch = min(policy.batch, work.prompts)
    batches = min(policy.batches, -(-work.prompts // batch))
    return replace(policy, batch=batch, batches=batches, chunk=policy.even_chunk(work.prompt))


def _beyond(chunks: Sequence[Chunk], costs: Sequence[tuple[float, float]]) -> Line:
    """What tokens that are in the cache add to the cost of a chunk: of batch · past, and of batch · chunk · past.

    costs: of each chunk, and what it would be without them.
    """
    if not chunks:
        return Line([(1.0, 1.0)], [0.0])
    rows = [(c.batch * c.past, c.batch * c.chunk * c.past) for c in chunks]
    return Line(rows, [max(0.0, whole - alone) for whole, alone in costs], [whole for whole, _ in costs])

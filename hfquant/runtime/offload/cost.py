"""The cost model: seconds and bytes of a policy, from what one block was measured to need.

For one pass of a block of batches through all layers, as in the paper, every resource is busy for its own sum and the
slowest decides.  A processor that reads also computes, so its time is a resource too:

    T = max(disk, compute, (compute · threads + reading's share of a processor · disk) / cores)

The first pass fills the cache, each following one reads it and adds a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import nnls

from .hardware import Hardware
from .pieces import Piece, footprint
from .placement import choose, kept, largest_streamed
from .policy import Policy
from .probe import Probe

IN_FLIGHT = 4  # copies of one layer's cache on its way: read ahead, read, joined with the new token, being written


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
    """What a policy will take.  prefill: the first pass of a block; decode: the mean following one.  peak: bytes of
    the process at most; disk: bytes of temporary files."""

    prefill: Pass
    decode: Pass
    seconds: float
    tokens_per_second: float
    latency: float
    peak: int
    disk: int


class _Line:
    """y ≥ 0 as a sum of non-negative multiples of some terms, fitted to a few measurements."""

    def __init__(self, rows: Sequence[Sequence[float]], y: Sequence[float]) -> None:
        matrix, target = np.array(rows, dtype=float), np.array(y, dtype=float)
        weight = 1 / np.maximum(target, target.max() * 1e-3 + 1e-12)  # relative errors count
        scale = np.maximum(matrix.max(0), 1e-12)
        found, _ = nnls(matrix / scale * weight[:, None], target * weight)
        self.terms = found / scale

    def __call__(self, *row: float) -> float:
        return float(self.terms @ np.array(row))


class CostModel:
    """Predicts policies for one model on one machine."""

    def __init__(
        self,
        hardware: Hardware,
        probes: Sequence[Probe],
        pieces: Sequence[Sequence[Piece]],
        decoder: int,
        base: int,
        cached: bool = False,
    ) -> None:
        """decoder: how many of the stages are its blocks.  base: bytes of the process before anything is placed.
        cached: whether the weights' files stay in memory that nobody else needs, and so read faster."""
        self.hardware, self.pieces, self.layers, self.base = hardware, pieces, decoder, base
        self.read = hardware.cached_read if cached else hardware.disk_read
        self.read_cpu = hardware.cached_cpu if cached else hardware.read_cpu
        self.threads = torch.get_num_threads()
        first = [(1.0, p.batch * p.prompt, p.batch * p.prompt**2) for p in probes]
        later = [(1.0, p.batch, p.batch * p.prompt) for p in probes]
        self.prefill = _Line(first, [p.prefill.block for p in probes])
        self.decode = _Line(later, [p.decode.block for p in probes])
        self.around_prefill = _Line(first, [p.prefill.outside for p in probes])
        self.around_decode = _Line(later, [p.decode.outside for p in probes])
        counted = [p for p in probes if p.prefill.held]
        first = [(1.0, p.batch * p.prompt, p.batch * p.prompt**2) for p in counted]
        self.held = _Line(first, [p.prefill.held for p in counted])
        self.work = _Line(first, [max(p.prefill.work, p.prefill.outside_work) for p in counted])
        later = [(1.0, p.batch, p.batch * p.prompt) for p in counted]
        self.held_later = _Line(later, [max(0, p.decode.held - p.cache) for p in counted])
        self.work_later = _Line(later, [max(p.decode.work, p.decode.outside_work) for p in counted])
        self.cache_per_token = max(p.cache / (p.batch * p.prompt) for p in probes)

    def cache(self, batch: int, tokens: float, bits: int = 16) -> float:
        """Bytes of one layer's cache of one batch."""
        exact = batch * tokens * self.cache_per_token
        return exact if bits >= 16 else exact * (bits + 0.5) / 16

    def predict(self, policy: Policy, work: Workload) -> Prediction:
        """Seconds and bytes of a whole workload."""
        policy = fitted(policy, work)
        resident = choose(self.pieces, policy.weights)
        streamed = sum(footprint(stage) for stage in self.pieces) - kept(self.pieces, resident)
        first, later = self.passes(policy, work, streamed)
        blocks = -(-work.prompts // policy.block)
        latency = first.seconds + (work.new - 1) * later.seconds
        seconds = blocks * latency
        return Prediction(
            first, later, seconds, work.prompts * work.new / seconds, latency,
            self.peak(policy, work), self.disk(policy, work),
        )  # fmt: skip

    def passes(self, policy: Policy, work: Workload, streamed: float) -> tuple[Pass, Pass]:
        """The first pass, and the mean of the following ones, with `streamed` bytes of weights read in each."""
        b, n, s = policy.batch, policy.batches, work.prompt
        context = s + work.new / 2
        on_disk = min(policy.cache_on_disk, self.layers) * n
        compute = n * (len(self.pieces) * self.prefill(1, b * s, b * s * s) + self.around_prefill(1, b * s, b * s * s))
        stored = on_disk * self.cache(b, s, policy.cache_bits) / self.hardware.disk_write
        first = self._pass(compute, streamed / self.read + stored, policy.depth)
        compute = n * (self.layers * self.decode(1, b, b * context) + self.around_decode(1, b, b * context))
        if len(self.pieces) > self.layers:  # an encoder runs in the first pass alone
            streamed *= self.layers / len(self.pieces)
        moved = on_disk * self.cache(b, context, policy.cache_bits) / self.hardware.disk_read
        stored = on_disk * self.cache(b, 1, policy.cache_bits) / self.hardware.disk_write
        return first, self._pass(compute, streamed / self.read + moved + stored, policy.depth)

    def _pass(self, compute: float, disk: float, depth: int) -> Pass:
        if depth == 0:  # one after the other
            return Pass(compute, disk, compute + disk)
        processor = (compute * self.threads + self.read_cpu * disk) / max(1, self.hardware.cores)
        return Pass(compute, disk, processor)

    def peak(self, policy: Policy, work: Workload) -> int:
        """Bytes of the process at most: the largest moment of the first pass, or of the last."""
        resident = choose(self.pieces, policy.weights)
        busy = sum(1 for stage in self.pieces if any(p.name not in resident for p in stage))
        ring = min(policy.depth + 1, busy) * largest_streamed(self.pieces, resident)
        fixed = self.base + kept(self.pieces, resident) + ring
        return int(fixed + self.lanes(policy, work))

    def lanes(self, policy: Policy, work: Workload) -> float:
        """Bytes of everything but weights."""
        b, n, s = policy.batch, policy.batches, work.prompt
        end, bits = s + work.new, policy.cache_bits
        here = (self.layers - min(policy.cache_on_disk, self.layers)) * n
        flying = IN_FLIGHT if policy.cache_on_disk else 0
        first = n * self.held(1, b * s, b * s * s) + self.work(1, b * s, b * s * s)
        later = n * self.held_later(1, b, b * end) + self.work_later(1, b, b * end)
        return max(
            first + here * self.cache(b, s, bits) + flying * self.cache(b, s),
            later + here * self.cache(b, end, bits) + flying * self.cache(b, end),
        )

    def disk(self, policy: Policy, work: Workload) -> int:
        """Bytes of temporary files for the cache."""
        layers = min(policy.cache_on_disk, self.layers) * policy.batches
        return int(layers * self.cache(policy.batch, work.prompt + work.new, policy.cache_bits))


def fitted(policy: Policy, work: Workload) -> Policy:
    """The policy without room for prompts that are not there."""
    batch = min(policy.batch, work.prompts)
    return replace(policy, batch=batch, batches=min(policy.batches, -(-work.prompts // batch)))

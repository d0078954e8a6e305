"""The search for the best policy: a linear program for what lies where, inside a search over batch sizes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scipy.optimize import linprog

from ...errors import ResourceError
from .cost import CostModel, Prediction, Workload, fitted
from .pieces import footprint
from .policy import Policy

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST = 64  # batches that share a load of a layer


@dataclass(frozen=True)
class Solved:
    """A policy and what it is predicted to take."""

    policy: Policy
    prediction: Prediction


def solve(
    cost: CostModel,
    work: Workload,
    memory: int,
    disk: int = 1 << 62,
    *,
    bits: int = 16,
    depths: tuple[int, ...] = (0, 1, 2),
    latency: float | None = None,
    margin: int = 0,
) -> Solved:
    """The policy of the highest throughput whose process stays below `memory` bytes, its files below `disk`.

    latency: seconds that one block of prompts may take at most.  margin: bytes of `memory` left free.  Raises
    ResourceError, with the memory that would do, if there is none.
    """
    best: Solved | None = None
    memory -= margin
    for batch in BATCHES:
        if batch > max(1, work.prompts) and batch != BATCHES[0]:
            break
        before = 0.0
        for count in _counts(work, batch):
            found = [s for d in depths if (s := _place(cost, work, memory, disk, Policy(batch, count, 0, 0, bits, d)))]
            found = [s for s in found if latency is None or s.prediction.latency <= latency]
            if not found:
                break  # more batches need more memory, and more time
            here = max(found, key=lambda s: s.prediction.tokens_per_second)
            if best is None or here.prediction.tokens_per_second > best.prediction.tokens_per_second:
                best = here
            if here.prediction.tokens_per_second < 0.98 * before:
                break  # past the point where computing, not loading, takes the time
            before = max(before, here.prediction.tokens_per_second)
    if best is None:
        raise _too_little(cost, work, memory, latency, margin)
    return best


def _counts(work: Workload, batch: int) -> Iterator[int]:
    """Numbers of batches that share a load: all small ones, then in steps of a quarter."""
    count = 1
    while count <= min(MOST, -(-work.prompts // batch)):
        yield count
        count += max(1, count // 4)


def _place(cost: CostModel, work: Workload, memory: int, disk: int, policy: Policy) -> Solved | None:
    """The best placement for these batch sizes, rounded to whole tensors and layers; None if nothing fits."""
    policy = fitted(policy, work)
    layers = _linear_program(cost, work, memory, policy)
    if layers is None:
        return None
    for on_disk in range(layers, cost.layers + 1):  # whole layers: at most one more than the program's fraction
        chosen = replace(policy, cache_on_disk=on_disk)
        room = memory - cost.peak(replace(chosen, weights=0), work)
        if room >= 0 and cost.disk(chosen, work) <= disk:
            chosen = replace(chosen, weights=_most(cost, work, memory, chosen))
            return Solved(chosen, cost.predict(chosen, work))
    return None


def _linear_program(cost: CostModel, work: Workload, memory: int, policy: Policy) -> int | None:
    """Layers whose cache goes to disk, rounded up; None if no placement fits.

    Variables: w, the share of the weights in memory; c, the layers with their cache on disk; the seconds of the first
    and of a following pass.  Every resource's time is linear in w and c, and so is memory.
    """
    total, L = sum(footprint(stage) for stage in cost.pieces), cost.layers
    corners = {(w, c): _corner(cost, work, policy, total, w, c) for w, c in ((0, 0), (1, 0), (0, L))}
    (zero, zero_bytes), (weights, weight_bytes), (cache, cache_bytes) = corners.values()
    rows, limits = [], []
    for which in (0, 1):
        for name in ("compute", "disk", "processor"):
            at, dw, dc = (getattr(p[which], name) for p in (zero, weights, cache))
            seconds = [-1.0, 0.0] if which == 0 else [0.0, -1.0]
            rows.append([dw - at, (dc - at) / L, *seconds])
            limits.append(-at)
    rows.append([weight_bytes - zero_bytes, (cache_bytes - zero_bytes) / L, 0.0, 0.0])
    limits.append(memory - zero_bytes)
    objective = [0.0, 1e-9, 1.0, float(work.new - 1)]  # of equal times, the one with less on disk
    solved = linprog(objective, rows, limits, bounds=[(0, 1), (0, L), (0, None), (0, None)], method="highs")
    return None if solved.x is None else int(-(-(solved.x[1] - 1e-6) // 1))


def _corner(cost: CostModel, work: Workload, policy: Policy, total: int, w: float, c: int) -> tuple[tuple, float]:  # type: ignore[type-arg]
    """Passes and bytes with the share w of the weights in memory and c layers' cache on disk."""
    chosen = replace(policy, cache_on_disk=c)
    ring = 0.0 if w else (policy.depth + 1) * max(footprint(stage) for stage in cost.pieces)
    nbytes = cost.base + w * total + ring + cost.lanes(chosen, work)
    return cost.passes(chosen, work, total * (1 - w)), nbytes


def _most(cost: CostModel, work: Workload, memory: int, policy: Policy) -> int:
    """The most bytes of weights that stay in memory, to the tensor: as the ring shrinks with them, found by halving."""
    low, high = 0, sum(footprint(stage) for stage in cost.pieces)
    if cost.peak(replace(policy, weights=high), work) <= memory:
        return high
    while high - low > 1 << 12:
        middle = (low + high) // 2
        fits = cost.peak(replace(policy, weights=middle), work) <= memory
        low, high = (middle, high) if fits else (low, middle)
    return low


def _too_little(cost: CostModel, work: Workload, memory: int, latency: float | None, margin: int) -> ResourceError:
    smallest = Policy(1, 1, 0, cost.layers, 16, 0)
    needed = cost.peak(smallest, work)
    if latency is not None and needed <= memory:
        seconds = cost.predict(smallest, work).latency
        return ResourceError(f"no policy answers within {latency:.3g} s; one prompt alone takes {seconds:.3g} s")
    return ResourceError(
        f"the model needs at least {(needed + margin) / 1e6:,.0f} MB of memory, one prompt at a time; "
        f"{(memory + margin) / 1e6:,.0f} MB are allowed",
        "allow more with `--host-memory`, or shorten the prompts",
    )

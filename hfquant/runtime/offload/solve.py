"""The search for the best policy: a linear program for what lies where, inside a search over batch sizes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scipy.optimize import linprog

from ...errors import ResourceError
from .cost import CostModel, Pass, Prediction, Workload, fitted
from .policy import Policy

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST = 64  # batches that share a load of a layer
CHUNKS = (1, 2, 3, 4, 6, 8, 16)  # in which prompts pass
ROWS = 64  # tokens of a chunk of a batch, at least: fewer are multiplied hardly faster
CLOSE = 1.02  # policies within this of the best are as good


@dataclass(frozen=True)
class Solved:
    """A policy and what it is predicted to take."""

    policy: Policy
    prediction: Prediction


@dataclass(frozen=True)
class _Relaxed:
    """What a policy would take if tensors and layers could be divided: never more than it will."""

    policy: Policy
    seconds: float
    latency: float
    weights: int  # bytes of them in memory
    layers: int  # whose cache goes to disk, rounded up


def solve(
    cost: CostModel,
    work: Workload,
    memory: int,
    disk: int = 1 << 62,
    *,
    like: Policy | None = None,
    latency: float | None = None,
    margin: int = 0,
) -> Solved:
    """The policy of the highest throughput whose process stays below `memory` bytes, its files below `disk`.

    Of policies that are as fast, the one with least of the cache on disk, and whose prompts are answered soonest.
    like: says how the cache is kept and attended to.  latency: seconds that a block may take at most.  margin: bytes of
    `memory` left free.  Raises ResourceError, with the memory that would do, if there is none.
    """
    memory -= margin
    relaxed = sorted(_candidates(cost, work, memory, like or Policy(), latency), key=lambda r: r.seconds)
    found: list[Solved] = []
    for one in relaxed:
        if found and one.seconds > CLOSE * min(s.prediction.seconds for s in found):
            break
        placed = _place(cost, work, memory, disk, one)
        if placed is not None and (latency is None or placed.prediction.latency <= latency):
            found.append(placed)
    if not found:
        raise _too_little(cost, work, memory, disk, like or Policy(), latency, margin)
    bound = CLOSE * min(s.prediction.seconds for s in found)
    return _deeper(cost, work, memory, min((s for s in found if s.prediction.seconds <= bound), key=_effort))


def _effort(solved: Solved) -> tuple[int, bool, float]:
    """What to avoid if it brings nothing: files for the cache, prompts in chunks, then late answers."""
    return solved.policy.cache_on_disk, solved.policy.chunk is not None, solved.prediction.latency


def _deeper(cost: CostModel, work: Workload, memory: int, solved: Solved) -> Solved:
    """With one more layer read ahead, where that costs next to nothing: disks are not as steady as models of them."""
    if solved.policy.depth != 1 or not cost.place(solved.policy.weights).streamed:
        return solved
    policy = replace(solved.policy, depth=2)
    if cost.peak(replace(policy, weights=0), work) > memory:
        return solved
    policy = replace(policy, weights=min(policy.weights, _most(cost, work, memory, policy)))
    prediction = cost.predict(policy, work)
    return Solved(policy, prediction) if prediction.seconds < 1.01 * solved.prediction.seconds else solved


def _candidates(
    cost: CostModel, work: Workload, memory: int, like: Policy, latency: float | None
) -> Iterator[_Relaxed]:
    """All batch sizes, with the best a placement could bring; not reading ahead only where that does not fit."""
    even = {-(-work.prompts // k) for k in (1, 2, 3, 4)}
    for batch in sorted({b for b in (*BATCHES, *even) if b <= min(max(1, work.prompts), BATCHES[-1])}):
        for count in _counts(work, batch):
            fitting = [r for c in _chunks(cost, work, batch, like) if (r := _relaxed(cost, work, memory, c, count))]
            fitting = [r for r in fitting if latency is None or r.latency <= latency]
            if not fitting:
                break  # more batches need more memory, and more time
            yield from fitting


def _chunks(cost: CostModel, work: Workload, batch: int, like: Policy) -> Iterator[Policy]:
    """Prompts as a whole and in ever smaller chunks, where that was measured.

    Not with a compressed cache, which the next chunk would find rounded; by hand it can be had.
    """
    cut = cost.cuts and like.cache_bits == 16
    sizes = dict.fromkeys(-(-work.prompt // k) for k in CHUNKS)
    for size in sizes if cut else (work.prompt,):
        if size == work.prompt or batch * size >= ROWS:
            yield replace(like, batch=batch, chunk=size if size < work.prompt else None)


def _relaxed(cost: CostModel, work: Workload, memory: int, like: Policy, count: int) -> "_Relaxed | None":
    """The next layer being read ahead, else not, None if no placement fits either."""
    tried = (_relax(cost, work, memory, fitted(_of(like, like.batch, count, d), work)) for d in (1, 0))
    return next((r for r in tried if r is not None), None)


def _of(like: Policy, batch: int, count: int, depth: int) -> Policy:
    return replace(like, batch=batch, batches=count, weights=0, cache_on_disk=0, depth=depth)


def _counts(work: Workload, batch: int) -> list[int]:
    """Numbers of batches that share a load of a layer, so that blocks of prompts are of equal size."""
    most = -(-work.prompts // batch)
    return sorted({min(MOST, -(-most // blocks)) for blocks in range(1, 1 + min(most, 16))} | {1})


def _relax(cost: CostModel, work: Workload, memory: int, policy: Policy) -> _Relaxed | None:
    """The linear program of one choice of batches; None if no placement fits.

    Variables: w, the share of the weights in memory; c, the layers with their cache on disk; the seconds of the first
    and of a following pass.  Every resource's time is linear in w and c, and so is memory.
    """
    L, size = cost.layers, cost.place.size
    (zero, zero_bytes), (weights, weight_bytes), (cache, cache_bytes) = (
        _corner(cost, work, policy, w, c) for w, c in ((0, 0), (1, 0), (0, L))
    )
    rows, limits = [], []
    for which in (0, 1):
        for name in ("compute", "disk", "processor"):
            at, dw, dc = (getattr(p[which], name) for p in (zero, weights, cache))
            seconds = [-1.0, 0.0] if which == 0 else [0.0, -1.0]
            rows.append([dw - at, (dc - at) / L, *seconds])
            limits.append(-at)
    rows.append([weight_bytes - zero_bytes, (cache_bytes - zero_bytes) / L, 0.0, 0.0])
    limits.append(memory - zero_bytes)
    blocks = work.prompts / policy.block
    start = size * cost.feed.seconds
    objective = [start, 1e-9, blocks, blocks * (work.new - 1)]  # of equal times, the one with less on disk
    solved = linprog(objective, rows, limits, bounds=[(0, 1), (0, L), (0, None), (0, None)], method="highs")
    if solved.x is None:
        return None
    latency = float(solved.x[2] + (work.new - 1) * solved.x[3])
    inside = int(solved.x[0] * cost.place.total)
    return _Relaxed(policy, float(solved.fun), latency, inside, int(-(-(solved.x[1] - 1e-6) // 1)))


def _corner(cost: CostModel, work: Workload, policy: Policy, w: int, c: int) -> tuple[tuple[Pass, Pass], float]:
    """Passes and bytes with no (0) or all (1) weights in memory and c layers' cache on disk."""
    chosen = replace(policy, cache_on_disk=c)
    placed = cost.place(cost.place.total if w else 0)
    ring = (policy.depth + 1) * placed.largest
    nbytes = cost.base + placed.kept + ring + cost.lanes(chosen, work)
    return cost.passes(chosen, work, placed.streamed, placed.streamed_again(cost.encoders)), nbytes


def _place(cost: CostModel, work: Workload, memory: int, disk: int, relaxed: _Relaxed) -> Solved | None:
    """The best placement for these batch sizes, rounded to whole tensors and layers; None if nothing fits."""
    for on_disk in range(relaxed.layers, cost.layers + 1):  # whole layers: mostly at most one more
        chosen = replace(relaxed.policy, cache_on_disk=on_disk)
        if cost.peak(chosen, work) <= memory and cost.disk(chosen, work) <= disk:
            most = _most(cost, work, memory, chosen)
            ways = [replace(chosen, weights=w) for w in {most, min(most, relaxed.weights)}]
            return min((Solved(way, cost.predict(way, work)) for way in ways), key=lambda s: s.prediction.seconds)
    return None


def _most(cost: CostModel, work: Workload, memory: int, policy: Policy) -> int:
    """The most bytes of weights that stay in memory: the ring shrinks as they grow, which leaves room for more."""
    if cost.peak(replace(policy, weights=cost.place.total), work) <= memory:
        return cost.place.total
    lanes, room = cost.base + cost.lanes(policy, work), 0
    for _ in range(8):
        placed = cost.place(room)
        ring = min(policy.depth + 1, placed.busy) * placed.largest
        more = int(memory - lanes - ring)
        if more <= room:
            break
        room = more
    while room > 0 and cost.peak(replace(policy, weights=room), work) > memory:  # the last step may be too long
        room -= max(1 << 12, room >> 8)
    return max(0, room)


def _too_little(
    cost: CostModel, work: Workload, memory: int, disk: int, like: Policy, latency: float | None, margin: int
) -> ResourceError:
    """What is lacking for one prompt at a time, with its cache on disk."""
    singles = (replace(_of(cut, 1, 1, 0), cache_on_disk=cost.layers) for cut in _chunks(cost, work, 1, like))
    smallest = min(singles, key=lambda policy: cost.peak(policy, work))
    needed = cost.peak(smallest, work)
    if needed <= memory and cost.disk(smallest, work) > disk:
        return ResourceError(
            f"the cache of one prompt needs {cost.disk(smallest, work) / 1e6:,.0f} MB of disk, as memory has no room "
            f"for it; there are {disk / 1e6:,.0f} MB",
            "allow more memory with `--host-memory`, or name another folder with `--disk DIR`",
        )
    if latency is not None and needed <= memory:
        seconds = cost.predict(smallest, work).latency
        return ResourceError(f"no policy answers within {latency:.3g} s; one prompt alone takes {seconds:.3g} s")
    return ResourceError(
        f"the model needs at least {(needed + margin) / 1e6:,.0f} MB of memory, one prompt at a time; "
        f"{(memory + margin) / 1e6:,.0f} MB are allowed",
        "allow more with `--host-memory`, or shorten the prompts",
    )

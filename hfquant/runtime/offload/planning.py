"""From a model and a budget to a policy."""

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from ...machine import most_memory
from ...memory import give_back, unmap_libraries
from .cost import CostModel, Workload
from .hardware import Hardware, profile
from .measured import measure
from .model import HEAP, OffloadedModel
from .policy import Policy
from .probe import probe
from .reader import BUFFER
from .scratch import default_folder
from .solve import Solved, solve

READERS = 4  # threads that read: two for weights, two for the cache
HOLES = 5 * HEAP  # of free pages between those in use in the heap, until a stage ends: 10 to 21 MB were seen
MARGIN = 40 << 20  # of memory, left free: what allocators hold beyond what is asked of them


@dataclass(frozen=True)
class Budget:
    """What may be used: bytes of the whole process, bytes of temporary files, and where these go."""

    memory: int | None = None
    disk_bytes: int | None = None
    disk: Path | None = None


@dataclass(frozen=True)
class OffloadPlan:
    """A policy, what it is predicted to take, and what it was chosen from."""

    solved: Solved
    hardware: Hardware
    work: Workload
    memory: int
    more: dict[int, Solved]  # with that many bytes instead
    dtype: torch.dtype

    def note(self) -> str | None:
        """What would be faster on this processor, None if nothing is known to be."""
        faster = self.hardware.matmul / self.hardware.matmul_half
        if self.dtype != torch.bfloat16 or faster < 1.5 or self.solved.prediction.bottleneck == "disk":
            return None
        return f"this processor multiplies {faster:.1f} times as fast in float32: `--dtype float32`"


def cost_model(offloaded: OffloadedModel, work: Workload, memory: int, hardware: Hardware, like: Policy) -> CostModel:
    """Measure one block of an open model, which keeps its policy.  like: says how the cache is kept and attended to."""
    before = offloaded.policy
    offloaded.adopt(replace(like, weights=0, cache_on_disk=0, depth=0, chunk=None))
    give_back()
    unmap_libraries()
    try:
        with torch.random.fork_rng(devices=[]):  # what is made up to be measured does not change what is sampled
            probe(offloaded, 1, 2, memory=False)  # the first run is slow, and brings back pages that running takes
            resting = psutil.Process().memory_info().rss
            measured = measure(offloaded, work.prompts, work.prompt, max(0, memory - resting - MARGIN))
        offloaded.let_go()
        give_back()
        base = psutil.Process().memory_info().rss + READERS * BUFFER
    finally:
        offloaded.adopt(before)
    base += HOLES
    base += max(p.nbytes for stage in offloaded.pieces for p in stage)  # a product may lay a matrix out anew
    return CostModel(
        hardware, measured, offloaded.pieces, offloaded.order.stacks[-1][1], base, appends=offloaded.appends()
    )


def plan_offload(
    offloaded: OffloadedModel,
    work: Workload,
    budget: Budget | None = None,
    *,
    like: Policy | None = None,
    latency: float | None = None,
) -> OffloadPlan:
    """The best policy for an open model; it is not adopted.

    like: says how the cache is kept and attended to.  latency: seconds that a block of prompts may take.
    Raises ResourceError if the budget is too small for any.
    """
    budget, like = budget or Budget(), like or Policy()
    memory = budget.memory if budget.memory is not None else int(0.9 * _available())
    folder = budget.disk or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        hardware = profile(folder)
    cost = cost_model(offloaded, work, memory, hardware, like)
    room = psutil.disk_usage(str(folder)).free
    disk = min(room, budget.disk_bytes) if budget.disk_bytes is not None else room
    solved = solve(cost, work, memory, disk, like=like, latency=latency, margin=MARGIN)
    more = {}
    for share in (1.5, 2.0):
        larger = int(memory * share)
        more[larger] = solve(cost, work, larger, disk, like=like, latency=latency, margin=MARGIN)
    give_back()
    unmap_libraries()  # the solver's
    return OffloadPlan(solved, hardware, work, memory, more, offloaded.skeleton.dtype)


def _available() -> int:
    """What this process could hold in all: not what the machine has, if a container gets less."""
    free = int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    return min(free, most_memory() or free)

"""A crew on a Ray cluster: the machines of a network, or the GPUs of one host.

Every job is a Ray task; what it needs travels through Ray's object store, once to each node.  A node that is lost takes
its tasks with it: Ray runs them on another one, and with them what it had been keeping.  The process that compresses
holds everything that cannot be computed again; it should be on the head node.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HfquantError, ResourceError
from ..nodes import connected
from .crew import PARTS, Job, checked, in_order

TRIES = 20  # that a job is given to another worker
AHEAD = 2  # jobs that wait for every part's: results are held by the cluster until it is their turn


@dataclass(frozen=True)
class Kept:
    """Something in the object store.  needs: what it is made from, kept as long: a lost one is made again."""

    ref: Any
    needs: tuple[Any, ...] = ()


class Cluster:
    """Whoever belongs to a Ray cluster.  hfquant has to be installed there.

    address: of the cluster, `auto` for one that this machine belongs to, `local` to begin one on this machine.
    device: `cuda` gives every worker a GPU.  threads: of each worker; on `cpu` a node with 16 cores has four workers of
    four threads.

    Raises ResourceError without Ray or a cluster, or where no node has what a worker needs.
    """

    def __init__(self, address: str = "auto", *, parts: int = PARTS, device: str = "cpu", threads: int = 1) -> None:
        self.parts, self.device, self.threads = checked(parts), device, threads
        self._ray = connected(address)
        gpus = 1 if device == "cuda" else 0
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= threads and n.get("GPU", 0) >= gpus for n in nodes):
            raise ResourceError(
                f"no node of the Ray cluster has {threads} cores" + (" and a GPU" if gpus else ""),
                "use fewer `threads`, or add nodes",
            )
        self._work = self._ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=TRIES)(_work)

    def keep(self, what: Any) -> Kept:
        return Kept(self._ray.put(what))

    def each(self, job: Job, shared: Any, parts: Iterable[Sequence[Any]], stay: int = 0) -> Iterator[Any]:
        def begin(part: Sequence[Any]) -> tuple[Sequence[Any], list[Any]]:
            refs = [given.ref if isinstance(given, Kept) else given for given in (shared, *part)]
            begun = self._work.options(num_returns=stay + 1).remote(job, self.device, self.threads, *refs)
            return (shared, *part), begun if stay else [begun]

        for needs, refs in in_order(begin, parts, AHEAD * self.parts):
            last = self._fetched(refs[-1])
            yield (*(Kept(ref, tuple(needs)) for ref in refs[:-1]), last) if stay else last

    def _fetched(self, ref: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, HfquantError | MemoryError | RuntimeError):
                raise error.cause from error
            raise
        except errors.RayError as error:
            raise ResourceError(
                f"the Ray cluster lost a job for good: {type(error).__name__}",
                "what is finished is kept: add nodes, or memory, and run the same command again",
            ) from error


def _work(job: Job, device: str, threads: int, shared: Any, *part: Any) -> Any:
    """On a node."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        return job(device, shared, *part)

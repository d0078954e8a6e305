"""Who works on a block: this process, several devices of this machine, or machines (see `cluster.py`).

A crew is a way to do one job on several parts.  What the calibration is cut into does not depend on how many work:
sums are taken over the same shards and added in the same order, so two and ten workers end in the same bytes.
"""

import copy
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..errors import ResourceError

PARTS = 8  # that calibration and weights are cut into, unless said otherwise: more workers than that find nothing to do
T = TypeVar("T")
Job = Callable[..., Any]  # job(device, shared, *part)


class Crew(Protocol):
    """parts: the number of pieces, which decides bytes and the most that can work at once; 1: nobody else is there.

    device: what blocks compute on, `cpu` or `cuda`.
    """

    parts: int
    device: str

    def keep(self, what: Any) -> Any:
        """Have something at hand for several jobs -> what stands for it in `shared` and in parts."""
        ...

    def each(self, job: Job, shared: Any, parts: Iterable[Sequence[Any]], stay: int = 0) -> Iterator[Any]:
        """job(device, shared, *part) for every part, somewhere, without gradients; in the order of the parts.

        stay: a job that returns a tuple leaves so many of its first items with whoever did it; what stands for them
        comes back.  Work that a lost worker had is done by others.
        """
        ...


class Alone:
    """This process."""

    parts = 1
    device = "cpu"

    def keep(self, what: Any) -> Any:
        return what

    def each(self, job: Job, shared: Any, parts: Iterable[Sequence[Any]], stay: int = 0) -> Iterator[Any]:
        for part in parts:
            yield job(self.device, shared, *part)


ALONE = Alone()


class Devices:
    """Several devices of this machine, each with a copy of the block; named twice, one is used by two at a time."""

    def __init__(self, devices: Sequence[str], parts: int = PARTS) -> None:
        kinds = {torch.device(device).type for device in devices}
        if len(kinds) != 1:
            raise ResourceError(f"devices of one kind work together, these are {', '.join(devices)}", "name GPUs only")
        self.device, self.parts = kinds.pop(), checked(parts)
        self._count = len(devices)
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._free.put(device)

    def keep(self, what: Any) -> Any:
        return what

    def each(self, job: Job, shared: Any, parts: Iterable[Sequence[Any]], stay: int = 0) -> Iterator[Any]:
        def work(part: Sequence[Any]) -> Any:
            device = self._free.get()
            try:
                with torch.no_grad():
                    return job(device, own(shared), *part)
            finally:
                self._free.put(device)

        with ThreadPoolExecutor(self._count) as pool:
            for begun in in_order(lambda part: pool.submit(work, part), parts, 2 * self._count):
                yield begun.result()


def in_order(begin: Callable[[Sequence[Any]], T], parts: Iterable[Sequence[Any]], ahead: int) -> Iterator[T]:
    """What was begun for every part, in order; so many are begun before the first is looked at."""
    todo = iter(parts)
    waiting = deque(begin(part) for part in islice(todo, ahead))
    while waiting:
        yield waiting.popleft()
        waiting.extend(begin(part) for part in islice(todo, 1))


def own(shared: Any) -> Any:
    """What several may not use at once, copied: modules, which are hooked and moved."""
    if isinstance(shared, nn.Module):
        return copy.deepcopy(shared)
    return tuple(own(item) for item in shared) if type(shared) is tuple else shared


def checked(parts: int) -> int:
    """Raises ResourceError for a number of parts that is none."""
    if parts < 2:
        raise ResourceError(f"a crew works on two parts at least, not on {parts}", "leave the crew out to work alone")
    return parts

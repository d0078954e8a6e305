"""Time that does not count what other programs took: a plan is for the machine, not for the moment it was made in."""

import time
from pathlib import Path

import torch

QUEUE = Path("/proc/thread-self/schedstat")  # of Linux: nanoseconds running, and waiting for a processor


def undisturbed() -> float:
    """Seconds, without those in which this thread could have run but had no processor."""
    try:
        before = _waited()
        while True:  # a wait between the two clocks would be in one of them alone: a difference could be below zero
            now, after = time.perf_counter(), _waited()
            if after == before:
                return now - after * 1e-9
            before = after
    except (OSError, IndexError):  # another system, or one that does not count it
        return time.perf_counter()


def _waited() -> int:
    """Nanoseconds that this thread has waited for a processor so far."""
    return int(QUEUE.read_text().split()[1])


def computing() -> float:
    """Seconds of computing, without waiting of any kind where one thread does it."""
    return time.thread_time() if torch.get_num_threads() == 1 else undisturbed()

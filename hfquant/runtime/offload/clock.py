"""Time that does not count what other programs took: a plan is for the machine, not for the moment it was made in."""

import time
from pathlib import Path

import torch

QUEUE = Path("/proc/thread-self/schedstat")  # of Linux: nanoseconds running, and waiting for a processor


def undisturbed() -> float:
    """Seconds, without those in which this thread could have run but had no processor."""
    now = time.perf_counter()
    try:
        return now - int(QUEUE.read_text().split()[1]) * 1e-9
    except (OSError, IndexError):  # another system, or one that does not count it
        return now


def computing() -> float:
    """Seconds of computing, without waiting of any kind where one thread does it."""
    return time.thread_time() if torch.get_num_threads() == 1 else undisturbed()

"""How long something takes on a GPU: a graph of it, replayed."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from hfquant.runtime.kernels.triton.counters import counters

COLD = 200e6  # bytes that no cache holds
REPLAYS = 20


def microseconds(call: Callable[[], Any]) -> float:
    """Of one replay of a graph of it: the median."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with counters(torch.device("cuda", torch.cuda.current_device())), torch.cuda.graph(graph):
        call()
    times = []
    graph.replay()
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def copies(size: float) -> int:
    """How many weights of so many bytes no cache holds."""
    return max(2, round(COLD / size))

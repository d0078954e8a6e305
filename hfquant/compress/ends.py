"""Token embeddings and output head: large tables, rounded a piece at a time."""

import time

import torch

from ..methods.rtn import Method as Rtn
from ..model.blocks import Weight
from ..model.skeleton import Skeleton
from ..tensors.grid import Grid
from ..tensors.layer import Layer, Quantized
from .solve import Finished

ROWS = 8192  # of the table in float32 at a time


def compress_end(skeleton: Skeleton, parameter: str, grid: Grid, scale_dtype: torch.dtype) -> Finished:
    """Round one table to nearest with searched ranges; its rows are looked up, so there is no input to weigh with."""
    begun = time.perf_counter()
    info = skeleton.source.tensors[skeleton.stored[parameter][0]]
    rows, columns = info.shape
    parts, lost, whole = [], 0.0, 0.0
    for at in range(0, rows, ROWS):
        n = min(ROWS, rows - at)
        W = info.read(at * columns, n * columns).view(n, columns).float()
        layer = Rtn()(Layer(name=parameter, W=W), grid, scale_dtype)
        assert layer.Q is not None
        parts.append(layer.Q)
        lost += float((W - layer.effective).square().sum())
        whole += float(W.square().sum())
    Q = Quantized.concatenate(parts)
    weight = Weight(parameter, parameter.rpartition(".")[0], "embedding")
    return Finished(weight, Q, "rtn", (lost / max(whole, 1e-30)) ** 0.5, time.perf_counter() - begun, ())

"""What `--fastest` goes by is how long this machine takes."""

import time

import pytest
import torch

from hfquant.budget.speed import timed
from hfquant.budget.table import Option, Row, Table
from hfquant.recipe import GridSpec
from hfquant.runtime import kernels
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

SHAPES = ((1536, 576), (576, 1536), (2048, 2048))
GRIDS = ("w4g64", "w8g64", "w3g128")
CHAIN = 40  # layers one after the other: more than a cache holds, as a model's are


def option(spec: str | None, shape: tuple[int, int], **more: object) -> Option:
    grid = None if spec is None else GridSpec.model_validate(spec)
    bits = 32.0 if grid is None else grid.bits + 24 / grid.group_size
    nbytes = int(shape[0] * shape[1] * bits / 8)
    return Option(grid, nbytes, nbytes, 0.0, **more)  # type: ignore[arg-type]


def table(options: tuple[str | None, ...]) -> Table:
    rows = [
        Row(f"{shape}", "linear", shape[0] * shape[1], f"{shape}", tuple(option(o, shape) for o in options), shape)
        for shape in SHAPES
    ]
    return Table(tuple(rows), 0, 10**9)


def measured(shape: tuple[int, int], grid: Grid) -> float:
    """Seconds of one of many layers, each run after the others."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale, zero = grid.fit(W, search=0, dtype=torch.bfloat16)
    Q = Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)
    layers = [QLinear.from_quantized(Q, None, formats.load("native"), torch.float32) for _ in range(CHAIN)]
    x, best = torch.randn(1, shape[1]), float("inf")
    with torch.inference_mode(), kernels.mode("auto"):
        for _ in range(12):
            began = time.perf_counter()
            for layer in layers:
                layer(x)
            best = min(best, time.perf_counter() - began)
    return best / CHAIN


@pytest.mark.slow
def test_predicted_times_are_those_of_layers_that_run() -> None:
    """Of every shape and grid within a factor of two, and all together within a third."""
    found = timed(table(GRIDS), None, torch.float32)
    pairs = [
        (one.seconds or 0.0, measured(row.shape, one.grid.grid()))
        for row in found.rows
        for one in row.options
        if one.grid is not None
    ]
    assert all(0.5 < real / said < 2 for said, real in pairs), pairs
    assert sum(real for _, real in pairs) == pytest.approx(sum(said for said, _ in pairs), rel=1 / 3), pairs


def test_pruned_and_corrected_layers_are_timed_as_such() -> None:
    shape = (64, 128)
    options = (option("w4g64", shape), option("w4g64", shape, sparsity="2of4"), option("w3g64", shape, sparsity=0.5),
               option("w3g64", shape, rank=4), option("w4g64", shape, sparsity="2of4", rank=4))  # fmt: skip
    rows = (Row("a", "linear", shape[0] * shape[1], "a", options, shape),)
    found = timed(Table(rows, 0, 10**9), None, torch.float32).rows[0].options
    assert all(one.seconds is not None and 0 < one.seconds < 1 for one in found)
    assert len({one.name for one in found}) == len(options)

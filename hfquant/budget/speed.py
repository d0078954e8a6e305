"""How long this machine takes to multiply one token by a weight, on every grid: measured, not modelled.

A weight that is read from memory for every token takes at least as long as its bytes; one that is measured alone stays
in a cache.  So of each shape and grid a few rows are timed, and the bytes over the memory's bandwidth are the least.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.bench import bandwidth
from ..runtime import kernels
from ..runtime.nn import QLinear
from ..tensors import formats
from ..tensors.layer import LowRank, Quantized
from .candidates import FORMAT, Candidate
from .table import Option, Row, Table

ROWS = 1024  # of a weight that are timed
ROUNDS = 7  # the quickest counts: other work makes rounds slower, never faster


def timed(table: Table, config: Any, dtype: torch.dtype) -> Table:
    """The table with the seconds that every option takes to make a token.  config: the model's."""
    read, known = bandwidth(), dict[tuple[tuple[int, int], str], float]()

    def of(row: Row, option: Option) -> float:
        key = row.shape, option.name
        if key not in known:
            known[key] = _seconds(row.shape, option, dtype)
        copies = row.weights // (row.shape[0] * row.shape[1])
        each = max(known[key], option.data / copies / read)
        active = getattr(config, "num_experts_per_tok", None) or copies
        return each * min(active, copies)

    def multiplies(row: Row) -> bool:
        """A table that is only looked into takes no time, one that is the head too does."""
        return row.kind != "embedding" or row.tied

    rows = [
        replace(row, options=tuple(replace(o, seconds=of(row, o) if multiplies(row) else 0.0) for o in row.options))
        for row in table.rows
    ]
    return replace(table, rows=tuple(rows))


def _seconds(shape: tuple[int, int], option: Option, dtype: torch.dtype) -> float:
    """Of one token through a weight of that shape, in a cache."""
    rows, x = min(ROWS, shape[0]), torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    run: Callable[[Tensor], Tensor]
    if option.grid is None:
        run = nn.Linear(shape[1], rows, bias=False, dtype=dtype)
    else:
        run = QLinear.from_quantized(_random(rows, shape[1], option), None, formats.load(FORMAT), dtype)
    best = float("inf")
    with torch.inference_mode(), kernels.mode("auto"):
        run(x)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            run(x)
            best = min(best, time.perf_counter() - began)
    return best * shape[0] / rows


def _random(rows: int, columns: int, option: Option) -> Quantized:
    """Its values do not matter for speed."""
    assert option.grid is not None
    draw, grid = torch.Generator().manual_seed(0), option.grid.grid()
    groups = rows, grid.groups(columns)
    beside: dict[str, Any] = {}
    if option.sparsity is not None:
        places = Candidate(option.grid, option.sparsity).places
        beside = {
            "mask": places.choose(torch.rand(columns, rows, generator=draw)).T.contiguous(),
            "pattern": places.pattern,
        }
    if option.rank:
        u, v = (torch.ones(size, dtype=torch.int8) for size in ((rows, option.rank), (option.rank, columns)))
        beside["low_rank"] = LowRank(u=u, v=v, scale=torch.full((option.rank,), 1e-6))
    return Quantized(
        codes=torch.randint(0, grid.top + 1, (rows, columns), generator=draw, dtype=torch.uint8),
        scale=(torch.rand(groups, generator=draw) * 0.01 + 0.001).to(torch.float16),
        zero_point=torch.full(groups, grid.middle, dtype=torch.uint8),
        grid=grid,
        **beside,
    )

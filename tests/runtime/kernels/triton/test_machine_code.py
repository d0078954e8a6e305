"""What the compiler makes of the kernels for GPUs that are not here: no spilled registers, shared memory within limits,
tensor cores fed from registers, and no more instructions for a weight than recorded.

On a Hopper instructions are what limits a kernel that reads 4 bits: at 4.3 TB/s its 132 multiprocessors have time for
about 3.5 to 3.9 of them per weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from packaging import version

from hfquant.runtime.kernels.triton.configs import Config, shipped, table
from hfquant.runtime.kernels.triton.layout import weights
from hfquant.runtime.kernels.triton.signed import prepare
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import LowRank

from ...rounding import random

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

import triton

from hfquant.runtime.kernels.triton import linear, rounded, tokens

from .machine_code import SHARED, Launch, compiled, recorded

BF16, FP16 = torch.bfloat16, torch.float16
ARCHES = (80, 89, 90)
ONES = torch.ones(1, dtype=torch.int32)  # stands for counters
# instructions of the loop per weight, for up to 8 rows in bfloat16 on a Hopper
PLANES = {1: 2.1, 2: 2.2, 3: 3.2, 4: 2.4, 5: 3.5, 6: 3.5, 7: 4.5, 8: 4.0}
NIBBLES, BYTES = 1.6, 0.95
# from which on a Hopper's own instructions multiply; with fewer, triton 3.7 takes Ampere's
LEAST_ROWS = 8 if version.parse(triton.__version__).release >= (3, 9) else 16


@dataclass(frozen=True)
class Case:
    """A shipped configuration, or one of the kernels that have none."""

    kernel: str
    bits: int
    config: Config
    arch: int
    dtype: torch.dtype = BF16
    symmetric: bool = True
    extras: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("" if self.symmetric else " zeros")
        return f"{self.kernel} {self.bits} bit {kind}, {self.config.rows} rows, sm_{self.arch}"


def shipped_cases() -> Iterator[Case]:
    """Every entry of every table, for both types, and for zero points where they are few."""
    for arch in ARCHES:
        for kernel in ("planes", "nibbles", "bytes"):
            for widths, by_rows in table(arch)[kernel].items():
                for bits, rows in ((int(bits), int(rows)) for bits in widths.split() for rows in by_rows):
                    case = Case(kernel, bits, shipped(arch, kernel, bits, rows), arch)
                    yield case
                    if kernel == "planes":
                        yield replace(case, dtype=FP16)
                    if rows <= 16:
                        yield replace(case, symmetric=False)


def launch(monkeypatch: pytest.MonkeyPatch, case: Case) -> Launch:
    """A layer of 1024 columns in groups of 128, split in four; integers of a Hopper's many rows per channel."""
    grid = Grid(case.bits, 128, case.symmetric)
    config = replace(case.config, split=4)
    if case.kernel == "planes":
        x = torch.zeros(config.rows, 1024, dtype=case.dtype)
        W, bias, low_rank = weights(random(128, 1024, grid)), None, None
        if case.extras:
            bias = torch.zeros(128)
            factors = LowRank(u=torch.zeros(128, 30), v=torch.zeros(30, 1024), scale=torch.ones(30))
            low_rank = linear.low_rank(factors, W, case.dtype)
        return recorded(monkeypatch, lambda: linear.linear(x, W, bias, low_rank, config))[0]
    activations = Activations(symmetric=case.symmetric)
    if case.kernel == "bytes":
        grid = replace(grid, group_size=-1)
    integers = prepare(random(128, 1024, grid), activations)
    codes = torch.zeros(config.rows, 1024, dtype=torch.int8)
    scale = torch.ones(config.rows, 1)
    seen = tokens.Rounded(codes, scale, None if case.symmetric else scale, 1024)
    return recorded(monkeypatch, lambda: rounded.rounded(seen, integers, BF16, None, config))[0]


def check(case: Case, made: Launch) -> None:
    code = compiled(made, case.arch)
    assert code.spilled == 0
    assert code.shared <= SHARED[case.arch]
    if case.kernel == "planes":
        assert not code.loop["I2F"]
        assert not code.loop["I2FP"]
    group = "G" if case.arch == 90 and case.config.rows >= LEAST_ROWS else ""
    assert code.loop[f"{'H' if case.kernel == 'planes' else 'I'}{group}MMA"]
    per_weight = code.loop[""] / weights_per_thread(case, made)
    if case.arch == 90 and case.config.rows == 8 and case.symmetric and case.dtype == BF16:
        assert per_weight <= {"planes": PLANES.get(case.bits), "nibbles": NIBBLES, "bytes": BYTES}[case.kernel]


def weights_per_thread(case: Case, made: Launch) -> float:
    """That one turn of the loop multiplies."""
    constants: dict[str, Any] = made.arguments
    columns = constants["UNIT"]
    if case.kernel == "planes":
        columns = constants["FIELD"] * (16 if case.bits % 2 else 8 if case.bits % 4 else 4)
    return columns * case.config.outs / (32 * case.config.warps)


FEW = [
    *(Case("planes", bits, shipped(90, "planes", bits, 8), 90) for bits in (2, 3, 4, 8)),
    Case("planes", 4, shipped(90, "planes", 4, 16), 90, symmetric=False, extras=True),
    Case("planes", 4, shipped(90, "planes", 4, 64), 90, FP16),
    Case("planes", 4, shipped(80, "planes", 4, 8), 80),
    Case("planes", 4, shipped(89, "planes", 4, 64), 89, FP16),
    Case("nibbles", 4, shipped(90, "nibbles", 4, 8), 90),
    Case("nibbles", 4, shipped(89, "nibbles", 4, 16), 89, symmetric=False),
    Case("bytes", 8, shipped(90, "bytes", 8, 8), 90),
    Case("bytes", 8, shipped(90, "bytes", 8, 128), 90),
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_some_shipped_configurations(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, launch(monkeypatch, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in shipped_cases() if case not in FEW], ids=str)
def test_all_shipped_configurations(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, launch(monkeypatch, case))

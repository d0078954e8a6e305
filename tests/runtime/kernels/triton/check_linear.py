"""Weights of every width with 16-bit floats.  Run by test_interpreted.py."""

from itertools import product

import pytest
import torch
from torch import Tensor

from hfquant.runtime import kernels
from hfquant.runtime.kernels.triton.configs import Config
from hfquant.runtime.kernels.triton.dense import dense
from hfquant.runtime.kernels.triton.device.splits import JOINS
from hfquant.runtime.kernels.triton.layout import weights
from hfquant.runtime.kernels.triton.linear import linear, low_rank
from hfquant.runtime.nn import QLinear
from hfquant.runtime.reference import dense as reference
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import LowRank, Quantized

from ...rounding import random

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, COLUMNS = (1, 5, 16, 17), (576, 192, 512)
CASES = [
    # each width, type and group once, and with them by turns the numbers of rows and columns and the symmetric grids
    pytest.param(
        *(bits, dtype, group, ROWS[i % 4], COLUMNS[i % 3], i % 2 == 0),
        marks=[pytest.mark.slow] if bits == 1 and group < 128 else [],  # most fields in a word
    )
    for i, (bits, dtype, group) in enumerate(product(range(1, 9), (BF16, FP16), (32, 64, 128)))
]


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def exact(x: Tensor, Q: Quantized) -> Tensor:
    return x.double() @ Q.dequantize().double().T


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize(("bits", "dtype", "group", "rows", "columns", "symmetric"), CASES)
def test_every_width(bits: int, dtype: torch.dtype, group: int, rows: int, columns: int, symmetric: bool) -> None:
    """All terms are exact in 16 bits, so that nothing is lost but in float32 sums."""
    Q = random(20, columns, Grid(bits, group, symmetric))
    x = inputs(rows, columns, dtype)
    y = linear(x, weights(Q), config=Config(8 if rows < 16 else 16, 32), dtype=FP32)
    assert error(y, exact(x, Q)) < 2e-7


@pytest.mark.parametrize("group", [-1, 16, 48, 80, 96, 288, 512])
def test_groups_of_other_sizes(group: int) -> None:
    """Per channel; groups that end within a step; a last group that is shorter; columns that are no multiple of 16."""
    for columns in (300, 577):
        Q = random(20, columns, Grid(4, group, columns == 300))
        x = inputs(3, columns, FP16)
        assert error(linear(x, weights(Q), config=Config(8, 32), dtype=FP32), exact(x, Q)) < 2e-7


def test_results_are_rounded_once() -> None:
    Q, x = random(70, 192, Grid(4, 64)), inputs(5, 192, FP16)
    y = linear(x, weights(Q), config=Config(8, 64))
    assert y.dtype == FP16
    assert torch.equal(y, linear(x, weights(Q), config=Config(8, 64), dtype=FP32).half())


@pytest.mark.parametrize("join", JOINS)
def test_sums_split_over_columns(join: str) -> None:
    """More programs than steps, too; the counters are left as they were found; with bias and low rank on top."""
    Q, x, bias = random(50, 700, Grid(4, 128, False)), inputs(9, 700, FP16), torch.randn(50)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randint(-99, 99, s, dtype=torch.int8, generator=generator) for s in ((50, 20), (20, 700)))
    factors = LowRank(u=u, v=v, scale=torch.rand(20, generator=generator) * 1e-3)
    W = weights(Q)
    correction = low_rank(factors, W, FP16)
    assert correction is not None
    expected = exact(x, Q) + bias.double() + correction.inner(x).double()[:, :20] @ u.double().T
    for split in (2, 2, 4):
        y = linear(x, W, bias, correction, Config(8, 32, split=split), join, FP32)
        assert error(y, expected) < 5e-7


def test_a_rank_too_large_for_the_kernel() -> None:
    factors = LowRank(u=torch.ones(130, 65).to(torch.int8), v=torch.ones(65, 64).to(torch.int8), scale=torch.ones(65))
    assert low_rank(factors, weights(random(130, 64, Grid(4, 32))), FP16) is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_is_bit_for_bit_the_reference(bits: int) -> None:
    for group, columns, symmetric in ((128, 576, True), (64, 300, False)):
        Q = random(20, columns, Grid(bits, group, symmetric))
        assert torch.equal(dense(weights(Q), FP16), reference(Q, FP16))


def test_layers() -> None:
    """Through the dispatcher: few and many rows, bias, correction; and what the kernel does not take, with reasons."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randint(-99, 99, s, dtype=torch.int8, generator=generator) for s in ((70, 3), (3, 300)))
    base = random(70, 300, Grid(3, 64, False))
    Q = Quantized(
        **{**vars(base), "low_rank": LowRank(u=u, v=v, scale=torch.rand(3) * 1e-3), "input_scale": torch.rand(300) + 1}
    )
    layer = QLinear.from_quantized(Q, torch.randn(70), formats.load("native"), FP16)
    for rows in (1, 3, 200):
        x = inputs(rows, 300, FP16)
        with kernels.mode("reference"):
            expected = layer(x)
        with kernels.mode("gpu_exact"):
            y = layer(x[None])
            assert kernels.choose(x, layer.matrix).kernel.name == "gpu_exact"
        assert y.shape == (1, rows, 70)
        torch.testing.assert_close(y[0], expected, atol=2e-2, rtol=1e-2)
    with kernels.mode("gpu_exact"):
        assert kernels.choose(x.float(), layer.matrix).refused == (
            ("gpu_exact", "inputs are float32: tensor cores multiply 16 bits"),
        )
        odd = QLinear.from_quantized(random(70, 300, Grid(3, 100)), None, formats.load("native"), FP16)
        assert kernels.choose(x, odd.matrix).refused[0][1] == "groups of 100 columns: not a multiple of 16"

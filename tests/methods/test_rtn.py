"""Rounding to nearest: no code could be closer, and the search only ever helps."""

import pytest
import torch
from torch import Tensor

from hfquant.methods.rtn import Method
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer


@pytest.fixture
def W() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 100, generator=generator) * torch.rand(24, 1, generator=generator)


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(3, 32, False), Grid(8, -1, True), Grid(2, 7, False)], ids=str)
def test_codes_are_the_nearest(W: Tensor, grid: Grid) -> None:
    Q = Method()(Layer(name="l", W=W), grid, torch.float16).Q
    assert Q is not None
    lost = (W - Q.dequantize()).abs()
    for step in (-1, 1):
        moved = (Q.codes.int() + step).clamp(0, grid.top).to(torch.uint8)
        assert bool((lost <= (W - grid.decode(moved, Q.scale, Q.zero_point)).abs() + 1e-6).all())
    assert Q.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_lowers_the_error(W: Tensor, bits: int) -> None:
    layer, grid = Layer(name="l", W=W), Grid(bits, 32, False)
    plain, searched = (Method(search=n)(layer, grid, torch.float32).error() for n in (0, 40))
    assert 0 < searched < 0.97 * plain


def test_columns_with_large_inputs_count_more(W: Tensor) -> None:
    scales = torch.logspace(-2, 2, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    H, grid = torch.diag(scales), Grid(3, 50, False)
    blind = Method()(Layer(name="l", W=W), grid, torch.float32)
    seeing = Method()(Layer(name="l", W=W, H=H), grid, torch.float32)
    assert seeing.error() < 0.97 * Layer(name="l", W=W, H=H, Q=blind.Q).error()


def test_a_group_of_zeros_stays_zero() -> None:
    W = torch.zeros(4, 64)
    W[:, 32:] = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    done = Method()(Layer(name="l", W=W), Grid(4, 32, True), torch.float16)
    assert torch.equal(done.effective[:, :32], torch.zeros(4, 32))

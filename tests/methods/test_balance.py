"""The predicted rounding error that SmoothQuant descends: it is what rounding loses, and it is convex."""

import pytest
import torch
from torch import Tensor

from hfquant.methods._balance import Balance, Reader
from hfquant.methods._scaling import on_grid
from hfquant.methods.smoothquant import factors
from hfquant.tensors.activations import fake_quantize
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid

INPUTS = [
    Activations(8),
    Activations(8, symmetric=False),
    Activations(6, "group", 16),
    Activations(8, "static"),
    None,
]
GRIDS = [Grid(8, -1), Grid(4, 16), Grid(3, 16, False), Grid(16, -1)]


def inputs(tokens: int = 96, columns: int = 40) -> Tensor:
    """A few channels are many times larger than the others, in all tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    return x * torch.exp(1.5 * torch.randn(columns, generator=generator))


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 40, generator=generator) * torch.randn(n, 1, generator=generator).exp() for n in (30, 300)]


def balance(x: Tensor, how: Activations | None, grid: Grid) -> Balance:
    return Balance(x, x.amin(0), x.amax(0), [Reader(W.to(x), grid, how) for W in matrices()])


@pytest.mark.parametrize("how", INPUTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_is_that_of_the_error(how: Activations | None, grid: Grid) -> None:
    if how is None and grid.is_float:
        return
    b, u = balance(inputs().double(), how, grid), torch.linspace(-0.4, 0.5, 40).double()
    _, slope = b.error(u)
    for j in (0, 17, 39):
        step = torch.zeros_like(u)
        step[j] = 1e-6
        measured = (b.error(u + step)[0] - b.error(u - step)[0]) / 2e-6
        assert measured == pytest.approx(float(slope[j]), rel=1e-4, abs=1e-9 * float(slope.abs().max()))


@pytest.mark.parametrize("how", INPUTS, ids=str)
def test_it_is_convex(how: Activations | None) -> None:
    """Between any two points its logarithm lies below the line that joins them."""
    b, generator = balance(inputs(), how, Grid(4, 16)), torch.Generator().manual_seed(2)
    for _ in range(20):
        one, other = torch.randn(2, 40, generator=generator)
        ends = torch.tensor([b.error(one)[0], b.error(other)[0]]).log()
        assert torch.tensor(b.error((one + other) / 2)[0]).log() <= ends.mean() + 1e-4


@pytest.mark.parametrize("how", INPUTS[:3], ids=str)
@pytest.mark.parametrize("grid", [Grid(8, -1), Grid(6, 16)], ids=str)
def test_rounding_loses_what_is_predicted(how: Activations, grid: Grid) -> None:
    x = inputs(512)  # a little less is lost: the largest value of every group is exact
    b = balance(x, how, grid)
    for u in (torch.zeros(40), b.descend(torch.zeros(40), 40)):
        s, lost = u.exp(), []
        for W in matrices():
            y = x @ W.T
            rounded = fake_quantize(x / s, how) * s @ on_grid(W, s, grid, torch.float32).T
            lost.append((rounded - y).square().sum(1) / y.square().sum(1))
        assert 0.5 < float(torch.stack(lost).mean()) / (b.error(u)[0] / 12) < 1.25


@pytest.mark.parametrize("how", INPUTS, ids=str)
def test_a_descent_beats_every_alpha(how: Activations | None) -> None:
    x, W = inputs(), torch.cat(matrices()).abs().amax(0)
    b = balance(x, how, Grid(4, 16))
    tried = [factors(x.abs().amax(0), W, i / 10).log() for i in range(11)]
    least = min(b.error(u)[0] for u in tried)
    found = b.error(b.descend(torch.zeros(40), 80))[0]
    assert 0 < found < 0.97 * least


def test_channels_of_one_source_have_one_factor_and_dead_ones_none() -> None:
    x = inputs()
    x[:, 5] = 0
    source = torch.arange(40) // 4
    u = balance(x, INPUTS[0], Grid(8, -1)).descend(torch.zeros(40), 10, source)
    assert u[5] == 0
    alive = torch.cat([u[:4], u[8:]]).view(-1, 4)
    assert torch.equal(alive, alive[:, :1].expand_as(alive))
    assert alive.std() > 0.1


def test_a_single_large_row_counts() -> None:
    """Of a weight with more rows than are followed, none is missed that decides."""
    W = torch.randn(2000, 40, generator=torch.Generator().manual_seed(3)) / 100
    W[1777] = torch.linspace(-1, 0.9, 40)
    x = inputs()
    b = Balance(x, x.amin(0), x.amax(0), [Reader(W, Grid(4, -1), None)])
    s = torch.ones(40)
    y = x @ W.T
    lost = (x @ (on_grid(W, s, Grid(4, -1), torch.float32) - W).T).square().sum(1) / y.square().sum(1)
    assert float(lost.mean()) == pytest.approx(b.error(s.log())[0] / 12, rel=0.3)

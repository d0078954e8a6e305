"""What is learned of a compressed weight: it begins as the weight is, is stored as it is, and its gradients are those
of its definition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hfquant.methods._learned import Codes, OnGrid, learned
from hfquant.methods.lkd import RelativeError
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer, LowRank, Quantized

GRIDS = [Grid(2, 16, False), Grid(3, -1, False), Grid(4, 16, True), Grid(8, 7, False), Grid(16, -1, True)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(grid: Grid, W: Tensor, dtype: torch.dtype = torch.float16) -> Quantized:
    scale, zero = grid.fit(W, search=10, dtype=dtype)
    return Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)


def extras() -> dict[str, dict[str, Any]]:
    low_rank = LowRank(
        u=torch.randint(-127, 128, (6, 2), dtype=torch.int8), v=torch.randint(-127, 128, (2, 40), dtype=torch.int8),
        scale=torch.tensor([1e-5, 2e-5]),
    )  # fmt: skip
    divided = normal(40, seed=3).abs() + 0.5
    return {"plain": {}, "pruned": {"mask": normal(6, 40, seed=2) > 0}, "low rank": {"low_rank": low_rank},
            "divided": {"input_scale": divided}}  # fmt: skip


@pytest.mark.parametrize("what", extras())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_begins_as_the_weight_is_and_is_stored_as_it_runs(grid: Grid, what: str, dtype: torch.dtype) -> None:
    W = normal(6, 40)
    Q = replace(rounded(grid, W, dtype), **extras()[what])
    one = learned(Q, W)
    assert torch.equal(one.weight(), Q.dequantize())
    assert torch.equal(one.quantized().codes, Q.codes)
    with torch.no_grad():
        one.latent.add_(0.4 * normal(*one.latent.shape, seed=1))
        one.scale.mul_(1 + 0.03 * normal(*one.scale.shape, seed=2))
    after = one.quantized()
    assert not torch.equal(after.codes, Q.codes)
    assert (after.codes.dtype, after.scale.dtype, after.encoding) == (Q.codes.dtype, Q.scale.dtype, Q.encoding)
    assert torch.equal(one.weight(), after.dequantize())
    if after.mask is not None:
        assert (one.weight()[~after.mask] == 0).all()


def test_gradients_are_those_of_the_definition() -> None:
    """Straight-through inside the range, nothing outside, in u; exact in s."""
    u = 4 * normal(5, 3, 8).double() + 3.5
    s, z = normal(5, 3, 1, seed=1).double(), torch.full((5, 3, 1), 3.0).double()
    weight, top = normal(5, 3, 8, seed=2).double(), 7
    for t in (u, s):
        t.requires_grad_()
    (OnGrid.apply(u, s, z, top, torch.float64) * weight).sum().backward()
    mine = [t.grad.clone() for t in (u, s)]
    u.grad = s.grad = None
    clipped = u.clamp(-0.5, top + 0.5)  # autograd gives 0 outside
    passed = clipped + (clipped.round().clamp(0, top) - clipped).detach()
    (s * (passed - z) * weight).sum().backward()
    for own, defined in zip(mine, (u.grad, s.grad), strict=True):
        torch.testing.assert_close(own, defined)
    step = 1e-6
    for i in range(5):
        up, down = (torch.where(torch.arange(5)[:, None, None] == i, s + d, s) for d in (step, -step))
        lost = [float((OnGrid.apply(u, x, z, top, torch.float64) * weight).sum().detach()) for x in (up, down)]
        assert (lost[0] - lost[1]) / (2 * step) == pytest.approx(float(mine[1][i].sum()), rel=1e-5)


def test_gradients_of_a_weight_that_is_pruned_only_are_those_of_its_definition() -> None:
    """W = (W₀ + step·v)·g, exactly, but for the rounding to the stored type: step is of each row, g too."""
    W, G = normal(6, 40), normal(6, 40, seed=2)
    one = learned(rounded(Grid(16, -1, True), W), W)
    step = one.quantized().codes.float().abs().amax(1, keepdim=True) / 256
    with torch.no_grad():
        one.latent.add_(normal(6, 40, seed=3))
        one.scale.mul_(1.1)
    v, g = (t.detach().clone().requires_grad_() for t in (one.latent, one.scale))
    for t in (one.latent, one.scale):
        t.requires_grad_()
    (one.weight() * G).sum().backward()
    ((learned(rounded(Grid(16, -1, True), W), W).weight() + step * v) * g * G).sum().backward()
    torch.testing.assert_close(one.latent.grad, v.grad)
    torch.testing.assert_close(one.scale.grad, g.grad)


@pytest.mark.parametrize("what", extras())
def test_gradients_reach_what_is_learned_through_all_that_is_stored(what: str) -> None:
    W, x, y = normal(6, 40), normal(32, 40, seed=5), normal(32, 6, seed=6)
    one = learned(replace(rounded(Grid(4, 16, True), W), **extras()[what]), W)
    one.scale.requires_grad_()

    def loss() -> Tensor:
        return (x @ one.weight().T - y).square().mean()

    loss().backward()
    gradient = one.scale.grad
    assert gradient is not None
    with torch.no_grad():
        before = float(loss())
        one.scale.sub_(0.1 * gradient / gradient.norm())
        assert float(loss()) < before


def test_a_weight_that_differs_from_the_nearest_code_stays_where_it_was_put() -> None:
    """GPTQ leaves codes that are not the nearest ones: learning begins there."""
    W = normal(6, 40)
    Q = rounded(Grid(3, 8, False), W)
    moved = replace(Q, codes=(Q.codes.int() + torch.randint(-2, 3, Q.shape)).clamp(0, 7).to(torch.uint8))
    assert torch.equal(Codes(moved, W).weight(), moved.dequantize())
    assert Layer(name="", W=W, Q=moved).error() > Layer(name="", W=W, Q=Q).error()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_a_block_is_the_mean_relative_error_of_its_tokens(dtype: torch.dtype) -> None:
    y, t = normal(2, 5, 8).to(dtype), normal(2, 5, 8, seed=1)
    t[0] *= 100  # large tokens count no more than others
    mine, defined = y.clone().requires_grad_(), y.double().requires_grad_()
    loss = RelativeError.apply(mine, t)
    true = ((defined - t).square().sum(-1) / t.double().square().sum(-1)).mean()
    torch.testing.assert_close(loss.double(), true)
    (3 * loss).backward()
    (3 * true).backward()
    assert mine.grad is not None
    assert defined.grad is not None
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad, defined.grad.to(dtype))

"""Quantizers whose clipping is learned: the gradients of their definitions, and what is stored is what ran."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hfquant.tensors.grid import Grid
from hfquant.train.scaling import Kind, Scaling

KINDS: list[Kind] = ["dynamic", "pact", "lsq", "laq"]
SPREAD: dict[str, Any] = {
    "matrix": {"grid": -1, "whole": True},
    "row": {"grid": -1, "whole": False},
    "ragged group": {"grid": 16, "whole": False},
}


def weight(rows: int = 6, columns: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def scaling(W: Tensor, kind: Kind, bits: int = 2, dtype: torch.dtype = torch.float32, **spread: Any) -> Scaling:
    spread = spread or SPREAD["matrix"]
    return Scaling(W, Grid(bits, spread["grid"], True), kind, "search", dtype, whole=spread["whole"])


def through(x: Tensor) -> Tensor:
    """⌊x⌉ with the gradient of x."""
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("spread", ["matrix", "row"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_papers_gradient_is_autograds_of_the_definition(bits: int, spread: str) -> None:
    """α·Q(clip(w, −α, α)/α) with α = γ·mean|w|, the mean a constant, and a rounding that gradients pass."""
    W, G = weight().requires_grad_(), weight(seed=1)
    own = scaling(W, "dynamic", bits, **SPREAD[spread])
    own.gain.data *= 0.9  # away from where the largest weight is just not clipped
    (own(W) * G).sum().backward()
    assert W.grad is not None
    gain = own.gain.detach().reshape(-1, 1).clone().requires_grad_()
    w = W.detach().clone().requires_grad_()
    size = w.detach().abs().mean() if spread == "matrix" else w.detach().abs().mean(1, keepdim=True)
    alpha, n = gain * size, 2 ** (bits - 1) - 1
    clipped = torch.minimum(torch.maximum(w, -alpha), alpha)
    (alpha * through(n * clipped / alpha) / n * G).sum().backward()
    torch.testing.assert_close(own.gain.grad.view_as(gain), gain.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(W.grad, w.grad)
    assert (W.grad == 0).any(), "some weights are clipped"
    assert (W.grad == G).any()


@pytest.mark.parametrize("kind", ["dynamic", "pact"])
def test_finite_differences_of_what_the_estimator_stands_for(kind: Kind) -> None:
    """Straight-through: the rounding's error r stays while γ moves, ŵ = clip(w, −α, α) + α·r; of PACT without it."""
    W, G = weight().double(), weight(seed=1).double()
    own = scaling(W, kind, 3)
    (own(W.float()) * G).sum().backward()
    unit = float(W.abs().mean()) if kind == "dynamic" else 1.0
    at = float(own.gain.detach()) * unit
    u = W.clamp(-at, at) / at
    r = (u * 3).round() / 3 - u

    def value(gain: float) -> float:
        alpha = gain * unit
        kept = alpha * r if kind == "dynamic" else at * r
        return float(((W.clamp(-alpha, alpha) + kept) * G).sum())

    h = 1e-7 * float(own.gain.detach())
    estimate = (value(at / unit + h) - value(at / unit - h)) / (2 * h)
    assert float(own.gain.grad) == pytest.approx(estimate, rel=1e-3)


def test_lsqs_gradient_is_that_of_its_paper() -> None:
    """∂ŵ/∂s = ⌊w/s⌉ − w/s inside and ±n outside, scaled by 1/√(n·count)."""
    W, G = weight(), weight(seed=1)
    own = scaling(W, "lsq", 4)
    (own(W) * G).sum().backward()
    s = float(own.gain.detach())
    ratio = W / s
    each = torch.where(ratio.abs() <= 7, ratio.round() - ratio, 7 * W.sign())
    expected = float((each * G).sum()) / math.sqrt(7 * W.numel())
    assert float(own.gain.grad) == pytest.approx(expected, rel=1e-4)


def test_laq_finds_the_clipping_of_least_weighted_error() -> None:
    W, second = weight(), weight(seed=1).square()
    own = scaling(W, "laq", 2)

    def lost(alpha: float) -> float:
        on_grid = (W / alpha).clamp(-1, 1).round() * alpha
        return float((second.sqrt() * (on_grid - W).square()).sum())

    before = lost(float(own.alpha))
    for _ in range(5):
        own.solve(W, second)
    found = float(own.alpha)
    assert lost(found) < before
    assert lost(found) <= 1.02 * min(lost(alpha) for alpha in torch.linspace(0.02, 0.2, 200).tolist())
    own(W.requires_grad_()).sum().backward()
    assert torch.equal(W.grad, torch.ones_like(W)), "the gradient reaches all weights"


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_ran_bit_for_bit(kind: Kind, spread: str) -> None:
    for bits in range(2, 9):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            W = weight()
            own = scaling(W, kind, bits, dtype, **SPREAD[spread])
            Q = own.quantized(W)
            assert Q.scale.dtype == dtype
            assert torch.equal(Q.dequantize(), own(W))
            assert int(Q.codes.min()) >= 1, "as many levels below zero as above"
            assert int(Q.codes.max()) < 2**bits


def test_at_2_bit_there_are_three_values_and_rows_have_their_own() -> None:
    W = weight() * torch.tensor([[1.0], [2], [4], [8], [16], [32]])
    whole, rows = scaling(W, "dynamic"), scaling(W, "dynamic", **SPREAD["row"])
    assert len(whole(W).unique()) == 3
    assert all(len(row.unique()) <= 3 for row in rows(W))
    assert rows.gain.shape == (6, 1, 1)
    assert float((rows(W) - W).detach().norm()) < 0.8 * float((whole(W) - W).detach().norm())


def test_the_clipping_follows_the_weights() -> None:
    """That is what makes it dynamic: weights twice as large have a clipping twice as large, of PACT not."""
    W = weight()
    torch.testing.assert_close(scaling(W, "dynamic", 4)(2 * W), scaling(2 * W, "dynamic", 4)(2 * W))
    own, pact = scaling(W, "dynamic", 4), scaling(W, "pact", 4)
    torch.testing.assert_close(own(2 * W), 2 * own(W))
    assert float(pact(2 * W).detach().abs().max()) == pytest.approx(float(pact(W).detach().abs().max()))


def test_it_begins_at_the_least_error_or_as_the_papers_say() -> None:
    W = weight()
    grid = Grid(4, -1, True)
    paper = Scaling(W, grid, "dynamic", "paper", torch.float32, whole=True)
    assert float(paper.gain.detach()) == pytest.approx(1)
    for kind in KINDS:
        start = Scaling(W, grid, kind, "paper", torch.float32, whole=True)
        assert float((scaling(W, kind, 4)(W) - W).detach().norm()) <= float((start(W) - W).detach().norm())


def test_a_weight_of_zeros_and_a_closed_clipping_stay_finite() -> None:
    for kind in KINDS:
        own = scaling(torch.zeros(4, 8), kind)
        assert torch.equal(own(torch.zeros(4, 8)), torch.zeros(4, 8))
    own = scaling(weight(), "dynamic")
    own.gain.data.fill_(-1.0)
    own(weight()).sum().backward()
    assert own(weight()).isfinite().all()
    assert own.gain.grad.isfinite().all()

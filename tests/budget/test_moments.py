"""F and b are those of their definition, whatever the block computes in."""

import pytest
import torch
from torch import nn

from hfquant.budget import moments
from hfquant.model.blocks import weights

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_sums_are_those_of_their_definition(
    dtype: torch.dtype, carried: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "multiplies_bfloat16", lambda: products)
    samples, seq, n, out = 3, 40, 24, 16
    block = nn.Sequential(nn.Linear(n, out)).to(dtype)
    (weight,) = weights(block)
    M = torch.eye(n) + 0.2 * torch.randn(n, n).triu(1) if carried else None
    made = moments.Gradients(block, [weight], {weight: M}, places=2 * samples * seq)
    F, b = torch.zeros(out, n, dtype=torch.float64), torch.zeros(out, dtype=torch.float64)
    for _ in range(2):
        x, g = torch.randn(samples, seq, n).to(dtype).requires_grad_(), 1e-3 * torch.randn(samples, seq, out).to(dtype)
        made.begin(samples)
        with made.watching():
            block(x).backward(g)
        G = g.double().transpose(1, 2) @ x.detach().double()
        F += (G if M is None else G @ M.double().T).square().sum(0)
        b += g.double().square().sum((0, 1))
    sums = made.sums[weight]
    assert sums.rows.tolist() == list(range(out))
    near = 1e-2 if dtype == torch.bfloat16 and products else 1e-5
    for found, meant in ((sums.F, F), (sums.b, b)):
        assert (found - meant).norm() < near * meant.norm()
    r = torch.randn(out, n)
    assert sums.loss(r) == pytest.approx(0.5 * float((r.double().square() * F).sum()) / sums.places, rel=near)


def test_what_carries_residuals_is_converted_once() -> None:
    """For all batches, and for weights that read the same."""
    block = nn.ModuleDict({"q": nn.Linear(8, 4), "k": nn.Linear(8, 4)})
    q, k = weights(block)
    M = torch.eye(8)
    made = moments.Gradients(block, [q, k], {q: M, k: M}, places=1)
    G = torch.ones(1, 4, 8, dtype=torch.bfloat16)
    first = made._carrying(q, G)
    assert first is not None
    assert first.dtype == torch.bfloat16
    assert made._carrying(k, G) is first
    assert made._carrying(q, G.float()) is M

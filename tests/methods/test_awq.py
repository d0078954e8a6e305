"""AWQ: its factors are the paper's, and the layer errors it reports are those of what it leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hfquant.compress.blocksteps import prepare
from hfquant.compress.view import BlockView
from hfquant.methods.awq import Method, size
from hfquant.model.blocks import weights
from hfquant.tensors.grid import Grid
from tests.methods.test_smoothquant import one_block, work

GRID = Grid(3, 32, symmetric=False)


@torch.no_grad()
def test_factors_are_the_mean_to_the_alpha(built: Callable[[str], Path], tmp_path: Path) -> None:
    block, passage = one_block(built("llama"), tmp_path)
    todo = work(weights(block), None, GRID)
    view = BlockView(block, passage, 0, todo.grids, {}, torch.float32, torch.float32, True)
    site = view.sites[0]
    inputs: list[torch.Tensor] = []
    hook = block.self_attn.q_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))  # type: ignore[union-attr, operator]
    seen = view.seen([site], hessian=True)[site]
    hook.remove()
    X = torch.cat(inputs).double()
    s = X.abs().mean(0).pow(0.3)
    s = s / (s.max() * s.min()).sqrt()
    torch.testing.assert_close(Method()._factors(view, site, seen, 0.3), s.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.H, (X.T @ X).float(), rtol=1e-4, atol=1e-3)
    # and its error is that of the outputs
    lost = 0.0
    for weight in site.members:
        W = weight.get(block)
        scaled = W * s.float()
        scale, zero = GRID.fit(scaled, dtype=torch.float32)
        Q = GRID.decode(GRID.encode(scaled, scale, zero), scale, zero) / s.float()
        lost += float(((W - Q).double() @ X.T).square().sum())
    assert Method()._error(view, site, seen, s.float()) == pytest.approx(lost, rel=1e-3)


def test_sizes_are_shares_of_the_largest_in_a_group() -> None:
    W = torch.tensor([[1.0, -4.0, 2.0, 10.0, 5.0], [3.0, 3.0, 0.0, 1.0, 2.0]])
    torch.testing.assert_close(
        size(W, Grid(4, 3)), torch.tensor([(0.25 + 1) / 2, 1.0, 0.25, (1 + 0.5) / 2, (0.5 + 1) / 2])
    )
    torch.testing.assert_close(size(W, None)[0], torch.tensor((0.1 + 1) / 2))


@pytest.mark.parametrize("by_weights", [False, True])
def test_every_site_gains_or_stays(trained: Callable[[str], Path], tmp_path: Path, by_weights: bool) -> None:
    with torch.no_grad():
        block, passage = one_block(trained("llama"), tmp_path)
    steps = [("awq", Method(weights=by_weights))]
    _, _, prepared = prepare(block, steps, work(weights(block), None, GRID), passage, 0, torch.float32)
    assert prepared.rows
    assert all(0 < row["error"] < row["error_before"] < 1 for row in prepared.rows)
    assert set(prepared.changed) <= {"input_layernorm.weight", "post_attention_layernorm.weight"}

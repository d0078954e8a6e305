"""Rounding what an earlier step pruned: zeros stay exactly zero, and the rest makes up for the rounding."""

from dataclasses import replace

import pytest
import torch

from hfquant.methods import _refine
from hfquant.methods._obs import damped
from hfquant.methods.gptq import Method as Gptq
from hfquant.methods.rtn import Method as Rtn
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer
from tests.methods.test_gptq_crosscheck import TEXTBOOK, layer, objective
from tests.methods.test_sparsegpt import mask, prune

GRIDS = [Grid(2, 32, True), Grid(3, -1, False), Grid(4, 64, True), Grid(8, 33, False), Grid(1, 16, True)]


@pytest.fixture
def pruned() -> Layer:
    return prune(layer(40, 96, 1024), pattern="2of4")


@pytest.mark.parametrize("method", [Rtn(), Gptq(), Gptq(**TEXTBOOK), Gptq(act_order=False)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_stay_zero(pruned: Layer, grid: Grid, method: Gptq | Rtn) -> None:
    done = method(pruned, grid, torch.float16)
    assert done.Q is not None
    assert bool((done.Q.dequantize()[~mask(pruned)] == 0).all())  # without the mask's help: for formats that have none
    zero = grid.expand(done.Q.zero_point, 96)
    assert torch.equal(done.Q.codes[~mask(pruned)], zero[~mask(pruned)])
    assert torch.equal(mask(done), mask(pruned))
    assert done.V is pruned.V


@pytest.mark.parametrize("bad", [None, torch.full((96, 96), torch.nan)], ids=["missing", "nan"])
def test_zeros_stay_zero_without_a_hessian(pruned: Layer, bad: torch.Tensor | None) -> None:
    done = Gptq()(replace(pruned, H=bad), Grid(4, 32), torch.float16)
    assert done.Q is not None
    assert bool((done.Q.dequantize()[~mask(pruned)] == 0).all())
    assert any("rounded to nearest" in note for note in done.notes)


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_gptq_after_pruning_beats_rounding_after_pruning(pruned: Layer, grid: Grid) -> None:
    nearest = objective(Rtn()(pruned, grid, torch.float16)) - objective(pruned)
    ours = objective(Gptq()(pruned, grid, torch.float16)) - objective(pruned)
    assert 0 < ours < 0.75 * nearest


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_refinement_on_a_mask_never_raises_the_objective(pruned: Layer, grid: Grid) -> None:
    after = [objective(Gptq(refine=rounds)(pruned, grid, torch.float16)) for rounds in (0, 1, 3)]
    assert after == sorted(after, reverse=True)
    assert after[1] < after[0]


def test_a_grid_is_fitted_to_what_is_kept(pruned: Layer) -> None:
    """Weights that are gone, however large they were, widen no range."""
    loud = replace(pruned, W=torch.where(mask(pruned), pruned.W, 100.0))
    for method in (Rtn(), Gptq()):
        done, same = (method(each, Grid(4, 32), torch.float16).Q for each in (loud, pruned))
        assert done is not None
        assert same is not None
        assert torch.equal(done.scale, same.scale)


@pytest.mark.parametrize("options", [TEXTBOOK, {}], ids=["textbook", "best"])
def test_a_mask_that_keeps_everything_changes_nothing(options: dict[str, object]) -> None:
    given, grid = layer(24, 96), Grid(3, 32, False)
    plain = Gptq(**options)(given, grid, torch.float16).Q
    full = Gptq(**options)(replace(given, mask=torch.ones(24, 96, dtype=torch.bool)), grid, torch.float16).Q
    assert plain is not None
    assert full is not None
    assert torch.equal(plain.codes, full.codes)
    assert torch.equal(plain.scale, full.scale)


def test_descent_leaves_pruned_codes_alone(pruned: Layer) -> None:
    Q = Gptq(refine=0)(pruned, Grid(3, 32), torch.float16).Q
    assert Q is not None
    assert pruned.H is not None
    H = damped(pruned.H, 0.01).float()
    free = _refine.refine(Q, pruned.W, H, rounds=3)
    held = _refine.refine(Q, pruned.W, H, rounds=3, mask=mask(pruned))
    assert bool((free.dequantize()[~mask(pruned)] != 0).any())
    assert bool((held.dequantize()[~mask(pruned)] == 0).all())

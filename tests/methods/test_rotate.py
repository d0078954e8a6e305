"""Rotation: orthogonal, exact inside a head and nowhere else, and outliers in the values are spread."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfquant.compress.blocksteps import prepare
from hfquant.compress.view import BlockView
from hfquant.methods.rotate import Method, hadamard
from hfquant.model.blocks import weights
from hfquant.model.sites import Rows
from hfquant.tensors.grid import Grid
from tests.methods.test_smoothquant import branches, one_block, output_error, work

# channels that can be turned together: of heads 16 wide, or 24, of which 8 is the largest power of two
SIZES = {
    "llama": 16,
    "qwen3": 8,
    "phi3": 2,
    "gpt2": 16,
    "gpt_neox": 16,
    "bloom": 16,
    "opt": 16,
    "opt-350m": 16,
    "t5": 16,
}


def test_hadamard_is_orthogonal_and_flat() -> None:
    for n in (2, 16, 128):
        H = hadamard(n)
        torch.testing.assert_close(H @ H.T, torch.eye(n))
        assert torch.equal(H, H.T)
        torch.testing.assert_close(H.abs(), torch.full((n, n), n**-0.5))


@torch.no_grad()
@pytest.mark.parametrize("family", SIZES)
def test_values_are_turned_within_heads(family: str, uneven: Callable[[str], Path], tmp_path: Path) -> None:
    block, passage = one_block(uneven(family), tmp_path)
    before = branches(block, passage, 0)
    found = weights(block)
    kept = {w: w.get(block).clone() for w in found}
    masters, _, prepared = prepare(
        block, [("rotation", Method(always=True))], work(found, None, Grid(4, -1)), passage, 0, torch.float32
    )
    after = branches(block, passage, 0)
    assert float((after - before).norm() / before.norm()) < 1e-5
    (row,) = prepared.rows  # neither up nor fc1: what an activation stands behind does not mix
    assert row["size"] == SIZES[family]
    turned = {w.module for w in found if not torch.equal(masters[w], kept[w])}
    assert turned == {*row["layers"], row["into"]}


@torch.no_grad()
def test_a_run_longer_than_a_head_is_refused(built: Callable[[str], Path], tmp_path: Path) -> None:
    block, passage = one_block(built("llama"), tmp_path)
    grids = {w: Grid(4, -1) for w in weights(block)}
    view = BlockView(block, passage, 0, grids, {}, torch.float32, torch.float32, True)
    (site,) = [s for s in view.sites if isinstance(s.maker, Rows) and s.name.endswith("o_proj")]
    before = {name: p.clone() for name, p in block.named_parameters()}
    assert not view.turn(site, hadamard(32), "rotation")
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert view.turn(site, hadamard(16), "rotation")


def planted(factor: float) -> tuple[str, Any]:
    """A step that makes one channel per head so many times larger in v, and smaller in o."""

    def step(view: BlockView) -> None:
        (site,) = [s for s in view.sites if isinstance(s.maker, Rows) and s.name.endswith("o_proj")]
        s = torch.ones(64)
        s[::16] = 1 / factor
        assert view.folder.scale(site, s) is not None

    return "plant", step


def test_outliers_are_spread_where_that_helps_and_only_there(built: Callable[[str], Path], tmp_path: Path) -> None:
    """Large columns of o share a scale with all others of their row: spread, they cost less.  Large rows of v have
    scales of their own: spread, they spoil the others, and the step leaves them.
    """
    grid, errors = Grid(4, -1, symmetric=False), {}
    for factor in (1 / 16, 16.0):
        for name, steps in (("plain", []), ("turned", [Method()]), ("always", [Method(always=True)])):
            todo = [planted(factor), *(("rotation", step) for step in steps)]
            errors[factor, name] = output_error(built("llama"), tmp_path / f"{factor}{name}", todo, None, grid)
    assert 0 < errors[1 / 16, "turned"] < 0.8 * errors[1 / 16, "plain"]
    assert errors[16.0, "always"] > errors[16.0, "plain"]
    assert errors[16.0, "turned"] == pytest.approx(errors[16.0, "plain"], rel=1e-6)

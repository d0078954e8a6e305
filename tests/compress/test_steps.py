"""Several steps on one layer: the report tells them apart, and weights are handled together only where they may."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hfquant import report
from hfquant.compress import compress
from hfquant.compress.block import compress_block
from hfquant.compress.rounding import Rounding
from hfquant.compress.solve import Finished, Work
from hfquant.measure.trail import step_errors
from hfquant.methods import lorc, rtn
from hfquant.model.blocks import weights
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer

GRID = Grid(3, 16, False)
SMALL = {"samples": 8, "seq_len": 64}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 24), nn.Linear(32, 40)


def finish(*steps: tuple[str, object], grid: Grid = GRID) -> tuple[Block, list[Finished]]:
    block = Block()
    masters = {w: w.get(block).clone() for w in weights(block)}
    work = Work(dict.fromkeys(masters, grid), steps, torch.float16)  # type: ignore[arg-type]
    with Rounding(block) as rounding:
        return block, list(compress_block(block, masters, work, None, 0, rounding))


def test_trail_holds_the_error_after_each_step() -> None:
    _, done = finish(("rtn", rtn.Method()), ("lorc", lorc.Method(rank=4)))
    for finished, source in zip(done, (Block().a, Block().b), strict=True):
        W = source.weight.detach()
        alone = rtn.Method()(Layer(name="l", W=W), GRID, torch.float16)
        assert [method for method, _ in finished.trail] == ["rtn", "lorc"]
        assert finished.trail[0][1] == pytest.approx(alone.error())
        assert finished.trail[1][1] == finished.error < 0.95 * alone.error()
        assert finished.Q.low_rank is not None
        assert finished.Q.low_rank.rank == 4
        assert float((W - finished.Q.dequantize()).norm() / W.norm()) == pytest.approx(finished.trail[1][1], rel=1e-4)


def test_the_block_runs_with_the_correction() -> None:
    block, done = finish(("rtn", rtn.Method()), ("lorc", lorc.Method(rank=4)))
    assert torch.allclose(block.b.weight, done[1].Q.dequantize())


def test_every_weight_gets_a_rank_of_its_own() -> None:
    """Layers with the same inputs are rounded as one tall matrix, but share no V."""

    class Seen(lorc.Method):
        def __call__(self, layer: Layer, grid: Grid, scale_dtype: torch.dtype) -> Layer:
            shapes.append((layer.name, tuple(layer.W.shape)))
            return super().__call__(layer, grid, scale_dtype)

    shapes: list[tuple[str, tuple[int, ...]]] = []
    finish(("rtn", rtn.Method()), ("lorc", Seen(rank=4)))
    assert shapes == [("a.weight", (24, 32)), ("b.weight", (40, 32))]


def test_without_a_grid_nothing_is_rounded() -> None:
    """Layers that a recipe prunes but does not round pass a quantizer by."""
    _, done = finish(("rtn", rtn.Method()), grid=Grid(16, -1))
    assert done[0].error is not None
    assert done[0].error < 1e-3
    assert done[0].Q.grid.is_float


def test_the_report_tells_steps_apart(built: Callable[[str], Path], tmp_path: Path) -> None:
    results = list(compress(built("llama"), "lorc-r4-w3g32", tmp_path, **SMALL))
    assert all([method for method, _ in result.trail] == ["rtn", "lorc"] for result in results)
    assert all(result.trail[1][1] == result.error <= result.trail[0][1] for result in results)
    found = step_errors(report.read(tmp_path))
    assert [(step.steps, step.layers) for step in found] == [("rtn", 21), ("rtn + lorc", 21)]
    assert found[0].error is not None
    assert found[1].error is not None
    assert 0 < found[1].error < 0.97 * found[0].error


def test_experts_go_without_low_rank_and_say_so(built: Callable[[str], Path], tmp_path: Path) -> None:
    results = list(compress(built("mixtral"), "lorc-r4-w3g32", tmp_path, **SMALL))
    for result in results:
        expert = result.kind == "experts"
        assert len(result.trail) == (1 if expert else 2)
        assert any("fused experts go without lorc" in note for note in result.notes) == expert

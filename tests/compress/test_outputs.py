"""Remembering what finished parts of a block return saves passes and changes no bit."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant.compress.block import compress_block
from hfquant.compress.outputs import remembering
from hfquant.compress.rounding import Rounding
from hfquant.compress.solve import Work
from hfquant.compress.streaming import Passage
from hfquant.methods.gptq import Method
from hfquant.model.blocks import weights
from hfquant.tensors.grid import Grid
from tests.compress.test_observe import first_passage


@torch.no_grad()
def compressed(folder: Path, at: Path, remember: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    """The codes of the first block, the hidden states behind it, and how many products its layers made."""
    streamer, passage = first_passage(folder, at)
    block = streamer.skeleton.load_module(passage.stack.blocks[0])
    found = weights(block)
    work = Work({w: Grid(4, 16) for w in found}, [("gptq", Method(match_original=0))], torch.float32)
    masters = {w: w.get(block).clone().float() for w in found}
    products = counted(block)
    before = {name: module.__dict__.get("forward") for name, module in block.named_modules()}
    with Rounding(block) as rounding, remembering(block, passage) if remember else nullcontext():
        done = list(compress_block(block, masters, work, passage, 0, rounding))
        after = passage.run(block, 0, at / "after")
    assert {name: module.__dict__.get("forward") for name, module in block.named_modules()} == before
    assert not list(at.glob("*.outputs")), "nothing is left on disk"
    return {d.weight.name: d.Q.codes for d in done}, after.read(0, 6), products[0]


def counted(block: nn.Module) -> list[int]:
    """How often a layer that is no container ran with its own weights, counted from here on."""
    count = [0]
    for weight in weights(block):
        module = block.get_submodule(weight.module)
        if weight.kind != "experts":
            forward = type(module).forward

            def run(*args: Any, _m: nn.Module = module, _f: Any = forward, **kwargs: Any) -> Any:
                count[0] += 1
                return _f(_m, *args, **kwargs)

            module.forward = run
    return count


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "phi"])
def test_the_same_bits_with_fewer_products(family: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    codes, after, products = compressed(built(family), tmp_path / "computed", False)
    again, remembered, fewer = compressed(built(family), tmp_path / "remembered", True)
    assert codes.keys() == again.keys()
    assert all(torch.equal(codes[name], again[name]) for name in codes)
    assert torch.equal(after, remembered)
    assert 0 < fewer < products


class Twice(nn.Module):
    """A block that runs one of its layers twice, and one that returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.last(self.second(self.first(x) + self.first(2 * x)))


@torch.no_grad()
def test_a_part_that_runs_twice_is_computed_twice(built: Callable[[str], Path], tmp_path: Path) -> None:
    _, passage = first_passage(built("llama"), tmp_path)
    block = Twice()
    pending = [w for w in weights(block) if w.module == "last"]

    def run() -> Tensor:
        return torch.cat([call(block, passage, batch) for batch in range(len(passage.batches))])

    expected = run()
    with remembering(block, passage):
        assert passage.outputs is not None
        passage.outputs.keep(pending)
        for _ in range(3):
            assert torch.equal(run(), expected)
        kept = [path.name for path in tmp_path.glob("*.outputs")]
        assert len(kept) == 1
        assert kept[0].endswith("second.outputs")
    assert passage.outputs is None


def call(block: nn.Module, passage: Passage, batch: int) -> Tensor:
    args, kwargs = passage.arguments(0, batch)
    return block(*args, **kwargs)

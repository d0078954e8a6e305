"""What a block ran with while the blocks behind it were calibrated is what the checkpoint holds, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant.compress import compress, pipeline, plan
from hfquant.plugin import load
from hfquant.recipe import Recipe
from hfquant.runtime.experts import QExperts
from hfquant.runtime.nn import QLinear
from tests.families import linears


@pytest.mark.parametrize(
    ("family", "recipe", "format"),
    [
        ("llama", "gptq-w4g32sym", "compressed_tensors"),
        ("llama", "gptq-w3g32", "gptq"),
        ("llama", "gptq-w5g48", "native"),
        ("gpt2", "gptq-w4g32", "gptq"),
        ("bart", "gptq-w3g32", "native"),
        ("mixtral", "gptq-w3g32", "native"),
        ("mixtral", "sparsegpt-2of4", "native"),
    ],
)
def test_every_layer_of_a_streamed_model(
    family: str, recipe: str, format: str, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, Tensor] = {}
    advance = pipeline._Run._advance

    def watched(self: Any, passage: Any, block: nn.Module, i: int) -> None:
        prefix = passage.stack.blocks[i]
        ran.update({f"{prefix}.{name}": p.clone() for name, p in block.named_parameters()})
        advance(self, passage, block, i)

    monkeypatch.setattr(pipeline._Run, "_advance", watched)
    chosen = Recipe.parse(recipe, [f"format={format}"])
    todo = plan(built(family), chosen, tmp_path / "out", samples=4, seq_len=32)
    finished = {layer.name for layer in compress(todo)}
    assert {name.removesuffix(".weight") for name in finished} == linears(family)
    model = load(tmp_path / "out")
    for name in finished:
        simulated, (path, _, leaf) = ran[name], name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QExperts):
            packed = module.dequantize(leaf, simulated.dtype)
        else:
            assert isinstance(module, QLinear)
            packed = module.dequantize(simulated.dtype)
            packed = packed.T if module.transposed else packed
        assert torch.equal(packed, simulated), name

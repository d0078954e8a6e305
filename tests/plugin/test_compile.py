"""torch.compile sees one graph in a compressed block."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hfquant.plugin import HfQuantConfig

from .models import IDS, load_with_transformers, logits


@pytest.mark.parametrize(
    ("format", "grid"), [("compressed_tensors", "w4g32sym"), ("gptq", "w4g32"), ("native", "w5g48")]
)
def test_a_block_is_one_graph(format: str, grid: str, dense: Callable[[str], Path]) -> None:
    recipe = {"steps": [{"method": "rtn", "search": 0}], "grid": grid, "format": format}
    model = load_with_transformers("llama", dense("llama"), quantization_config=HfQuantConfig(recipe))
    first = logits(model)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled = model(IDS, use_cache=False).logits
    assert torch.allclose(compiled, first, atol=1e-5)


def test_generate_may_compile(dense: Callable[[str], Path]) -> None:
    model = load_with_transformers("llama", dense("llama"), quantization_config=HfQuantConfig("rtn-w4g32"))
    assert model.hf_quantizer.is_compileable

"""The plugin and the streaming compressor make the same checkpoint of the same model and recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hfquant.compress import compress
from hfquant.plugin import HfQuantConfig, load

from .models import load_with_transformers, logits, quantization_config, same_tensors, stored

CASES = [
    ("llama", "compressed_tensors", "w4g32sym"),
    ("llama-tied", "native", "w5g48"),
    ("gpt2", "gptq", "w3g32"),
    ("t5", "native", "w4g32sym"),
    ("mixtral", "compressed_tensors", "w4g32sym"),
    ("mixtral", "native", "w3g32"),
    ("qwen3_moe", "native", "w4g32sym"),
]


@pytest.mark.parametrize(("family", "format", "grid"), CASES)
def test_streamed_and_loaded_are_the_same(
    family: str, format: str, grid: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = {"steps": [{"method": "rtn", "search": 3}], "grid": grid, "format": format, "dtype": "keep"}
    assert len(list(compress(dense(family), recipe, tmp_path / "streamed"))) > 0
    model = load_with_transformers(family, dense(family), quantization_config=HfQuantConfig(recipe))
    streamed = load(tmp_path / "streamed")
    mine, theirs = dict(model.named_parameters()), dict(streamed.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(model), logits(streamed))

    streamed.save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "streamed"), stored(tmp_path / "again"))
    assert quantization_config(tmp_path / "streamed") == quantization_config(tmp_path / "again")
    model.save_pretrained(tmp_path / "loaded")
    assert quantization_config(tmp_path / "streamed") == quantization_config(tmp_path / "loaded")
    assert same_tensors(stored(tmp_path / "streamed"), stored(tmp_path / "loaded"))

"""What is foreseen, beside what came."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant.compress import compress, plan
from hfquant.compress.estimate import base
from hfquant.compress.layout import fit, lay_out
from hfquant.model.headers import TensorInfo, read_header
from hfquant.model.source import Source
from hfquant.recipe import Recipe
from tests.families import byte_tokenizer
from tests.processes import fresh

SETTINGS = {"samples": 8, "seq_len": 32}
LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "architectures": ["LlamaForCausalLM"],
}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "rtn-w4g32"),
        ("llama", "rtn-w3g48"),
        ("llama", "sparsegpt-2of4-w4g32"),
        ("llama", "lorc-r4-w3g32"),
        ("llama", {"steps": [{"method": "rtn"}], "grid": "w5g32", "embeddings": "w8g32"}),
        ("gpt2", "gptq-w4g32"),
        ("bart", "rtn-w8"),
        ("mixtral", "rtn-w4g32"),
    ],
    ids=str,
)
def test_size(family: str, recipe: Any, built: Callable[[str], Path], tmp_path: Path) -> None:
    todo = plan(built(family), recipe, tmp_path / "out", **SETTINGS)
    list(compress(todo))
    files = (tmp_path / "out").glob("*.safetensors")
    written = sum(tensor.nbytes for file in files for tensor in read_header(file).values())
    assert todo.estimate.bytes_after == pytest.approx(written, rel=0.01)
    assert 0.05 < todo.estimate.bytes_after / todo.estimate.bytes_before < 0.6


def foreseen(calibration: str, tmp_path: Path) -> tuple[int, int]:
    """Parameters of a model of which there are headers only, and the bytes that its compression takes on top."""
    config = LlamaConfig(**LLAMA)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {n: TensorInfo(tmp_path, 0, torch.bfloat16, tuple(p.shape)) for n, p in model.named_parameters()}
    recipe = Recipe.parse("gptq-w4g64", [f"calibration.source={calibration}"])
    laid = lay_out(Source("model", None, tmp_path, config, tensors, ()), recipe)
    _, _, expected = fit(laid, recipe, torch.empty(64, 512, dtype=torch.int64, device="meta"))
    return expected.parameters, expected.peak_memory - base()


def test_a_model_that_writes_its_own_text_is_in_memory_whole(tmp_path: Path) -> None:
    parameters, peak = foreseen("self", tmp_path)
    assert peak > 4 * parameters
    assert foreseen("default", tmp_path)[1] < 0.8 * peak


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gptq-w4g64", "rtn-w4g64"])
def test_memory(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    code = f"""
        import json
        from hfquant.compress import compress, plan
        from hfquant.machine import peak_memory
        from hfquant.measure.verify import verify

        todo = plan({str(tmp_path / "model")!r}, {recipe!r}, {str(tmp_path / "out")!r}, samples=8, seq_len=256)
        found = {{"compress": [todo.estimate.peak_memory], "measure": [todo.measuring(4).peak_memory]}}
        for layer in compress(todo):
            pass
        found["compress"].append(peak_memory())
        verify({str(tmp_path / "out")!r}, against={str(tmp_path / "model")!r}, windows=4, enforce=False)
        found["measure"].append(peak_memory())
        print(json.dumps(found))
    """
    (said,) = fresh(code)
    assert said.code == 0, said.err
    for expected, measured in json.loads(said.out.splitlines()[-1]).values():
        assert expected == pytest.approx(measured, rel=0.25), said.out

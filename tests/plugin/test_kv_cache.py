"""`kv_cache` of a recipe: in the checkpoint, in what is loaded from it, and refused where it does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from hfquant.compress import compress
from hfquant.errors import FormatError, RecipeError
from hfquant.plugin import HfQuantConfig, load
from hfquant.runtime.kv_cache import CompressedLayer
from hfquant.tensors import formats
from hfquant.tensors.encoding import KVCache

from .models import quantization_config

RECIPE = {
    "steps": [{"method": "rtn", "search": 0}], "grid": "w8", "dtype": "keep",
    "kv_cache": {"bits": 4, "window": 4, "group_size": 4},
}  # fmt: skip


def test_a_checkpoint_brings_its_cache(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """Streamed or made while loading; through `from_pretrained`, `load` and a second save; not when dequantized."""
    list(compress(dense("llama"), RECIPE, tmp_path / "streamed"))
    said = quantization_config(tmp_path / "streamed")
    assert said["kv_cache"] == {"bits": 4, "window": 4, "group_size": 4}
    assert formats.parse(said).kv_cache == KVCache(4, 4, 4)
    made = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=HfQuantConfig(RECIPE))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    ids, greedy = torch.arange(4, 24)[None], {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    found = [model.eval().generate(ids, **greedy) for model in (made, read, load(tmp_path / "streamed"))]
    assert all(torch.equal(out.sequences, found[0].sequences) for out in found)
    layers = [layer for out in found for layer in out.past_key_values.layers]
    assert all(isinstance(layer, CompressedLayer) and layer.past for layer in layers)
    read.save_pretrained(tmp_path / "again")
    assert quantization_config(tmp_path / "again") == said
    plain = load(tmp_path / "streamed", dequantize=True).generate(ids, **greedy)
    assert not any(isinstance(layer, CompressedLayer) for layer in plain.past_key_values.layers)


def test_a_checkpoint_brings_its_queries(dense: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = RECIPE | {"kv_cache": RECIPE["kv_cache"] | {"queries": 8}}
    list(compress(dense("llama"), recipe, tmp_path / "out"))
    said = quantization_config(tmp_path / "out")
    assert said["kv_cache"] == {"bits": 4, "window": 4, "group_size": 4, "queries": 8}
    model = load(tmp_path / "out").eval()
    assert model.hfquant_kv_cache == KVCache(4, 4, 4, 8)
    out = model.generate(torch.arange(4, 24)[None], max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert all(layer.tokens.queries == 8 for layer in out.past_key_values.layers)
    with pytest.raises(RecipeError, match=r"Bloom.* cannot compare queries in 8 bit"):
        list(compress(dense("bloom"), recipe, tmp_path / "bloom"))
    assert not (tmp_path / "bloom" / "config.json").exists()


def test_what_does_not_fit_is_refused_before_work(dense: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="format `gptq` does not say that keys and values are kept in 4 bit"):
        list(compress(dense("llama"), RECIPE | {"format": "gptq", "grid": "w4g32"}, tmp_path / "out"))
    config = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    with pytest.raises(RecipeError, match="none of its layers keeps all tokens"):
        list(compress(tmp_path / "windowed", RECIPE, tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_newer_cache_is_not_guessed_at() -> None:
    said = {"quant_method": "hfquant", "format": "native", "version": 1, "scale_dtype": "float16", "groups": [],
            "modules_to_not_convert": [], "kv_cache": {"bits": 4, "shape": "spiral"}}  # fmt: skip
    with pytest.raises(FormatError, match=r"KV cache .* is not known"):
        formats.parse(said)

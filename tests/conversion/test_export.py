"""Exports: the same codes in another format, or a refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hfquant import dequantize, load
from hfquant.compress import compress
from hfquant.conversion.export import export
from hfquant.errors import CheckpointError, ExportError
from hfquant.recipe import Recipe
from hfquant.runtime.nn import Packed

IDS = torch.arange(4, 36)[None]
Made = Callable[..., Path]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def layers(folder: Path) -> dict[str, Packed]:
    return {name: module for name, module in load(folder).named_modules() if isinstance(module, Packed)}


@pytest.mark.parametrize(
    ("recipe", "family", "first", "to"),
    [
        ("rtn-w4g32", "llama", "native", "compressed-tensors"),
        ("rtn-w4g32", "llama", "compressed_tensors", "native"),
        ("rtn-w8", "opt", "native", "gptq"),
        ("rtn-w3g32asym", "llama", "gptq", "native"),
        ("rtn-w4g32asym", "gpt2", "native", "gptq"),
    ],
)
def test_the_same_codes_in_another_format(
    made: Made, tmp_path: Path, recipe: str, family: str, first: str, to: str
) -> None:
    folder = tmp_path / "first"
    scales = "float16" if "gptq" in (first, to) else "bfloat16"
    chosen = Recipe.parse(recipe, [f"format={first}", f"dtype={scales}"])
    for _ in compress(source(made, family), chosen, folder):
        pass
    done = export(folder, to, tmp_path / "second")
    assert done["wire"]["format"] == to.replace("-", "_")
    before, after = layers(folder), layers(tmp_path / "second")
    assert before.keys() == after.keys()
    for name, module in before.items():
        one, two = module.quantized(), after[name].quantized()
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale.float(), two.scale.float())
        assert torch.equal(one.zero_point, two.zero_point)
    assert torch.equal(logits(load(folder, dequantize=True)), logits(load(tmp_path / "second", dequantize=True)))


def test_what_the_format_cannot_say_is_named(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    for _ in compress(source(made, "llama"), Recipe.parse("rtn-w8", ["kv_cache=kv8"]), folder):
        pass
    assert "left_out" not in export(folder, "native", tmp_path / "native")["wire"]
    assert export(folder, "compressed-tensors", tmp_path / "other")["wire"]["left_out"] == ["kv_cache"]


def source(made: Made, family: str) -> str:
    """The folder of the dense model."""
    report = json.loads((made("rtn-w8", family) / "report.json").read_text())
    return str(report["source"]["id"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_needs_nothing_of_hfquant(made: Made, tmp_path: Path, family: str) -> None:
    folder = made("rtn-w8", family)
    export(folder, "dense", tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(stock.config, "quantization_config")
    assert torch.equal(logits(stock), logits(dequantize(load(folder))))
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "`AutoModelForCausalLM.from_pretrained`" in card
    assert "hfquant.load" not in card


def test_an_export_can_be_measured_and_pushed_as_it_is(made: Made, tmp_path: Path) -> None:
    export(made("rtn-w4g32"), "native", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    there = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert set(report["output"]["files"]) == there - {"report.json", "README.md"}
    assert report["evaluation"]["perplexity"] > 1
    before = json.loads((made("rtn-w4g32") / "report.json").read_text())
    assert report["evaluation"]["measured_as"] == before["wire"]["format"]
    assert before["evaluation"]["tokens_per_second"], "known of the one, not of the other"
    assert "tokens_per_second" not in report["evaluation"]
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize(
    ("recipe", "changes", "to", "problem"),
    [
        ("rtn-w5g32", (), "gptq", "5 bit does not exist"),
        ("rtn-w5g32sym", (), "compressed-tensors", "5 bit"),
        ("rtn-w4g48", (), "gptq", "48 does not divide"),
        ("rtn-w4g32", ("embeddings=w8",), "compressed-tensors", "expect nn.Linear, not embedding"),
        ("rtn-w4g32", ("overrides.*.down_proj=w8", "format=native"), "gptq", "cannot mix grids"),
        ("rtn-w4g32", ("dtype=float32", "format=native"), "nothing", "no export to"),
    ],
)
def test_what_cannot_be_said_is_refused(
    made: Made, tmp_path: Path, recipe: str, changes: tuple[str, ...], to: str, problem: str
) -> None:
    for _ in compress(source(made, "llama"), Recipe.parse(recipe, changes), tmp_path / "first"):
        pass
    with pytest.raises(ExportError, match=problem) as refused:
        export(tmp_path / "first", to, tmp_path / "second")
    assert refused.value.hint
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "second.tmp").exists()


def test_scales_that_would_be_rounded_are_refused(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    shutil.copytree(made("rtn-w4g32"), folder)
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["model.layers.0.mlp.up_proj.weight_scale"]
    assert scale.dtype == torch.bfloat16
    scale[0, 0] = 1e-12
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"scales in float16, which cannot hold those of model\.layers\.0\.mlp\.up"):
        export(folder, "gptq", tmp_path / "second")


def test_a_folder_that_holds_something_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        export(made("rtn-w4g32"), "native", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"

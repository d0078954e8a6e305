"""The longest recipes there are, on whole small models: every step is in the report, and the result runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hfquant
from hfquant.compress import compress
from hfquant.measure.trail import step_errors
from hfquant.recipe import Recipe
from tests.plugin.models import logits, relative

SETTINGS = {"samples": 8, "seq_len": 64}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_smoothed_pruned_rounded_corrected_and_inputs_rounded(
    family: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """[smoothquant, sparsegpt 2:4, gptq w4, lorc r8, a8]: what each of them cost or won back, layer by layer."""
    recipe = Recipe.parse("smoothquant+sparsegpt-2of4+gptq-w4a8g32+lorc-r8")
    assert [step.method for step in recipe.steps] == ["smoothquant", "sparsegpt", "gptq", "lorc"]
    results = list(compress(trained(family), recipe, tmp_path, **SETTINGS))
    report = json.loads((tmp_path / "report.json").read_text())
    for result in results:
        (pruned, rounded, corrected) = [error for _, error in result.trail]
        assert [method for method, _ in result.trail] == ["sparsegpt", "gptq", "lorc"]
        assert 0 < corrected < rounded
        assert pruned < rounded
        assert all(part in result.encoding for part in ("w4g32", "2of4", "r8", "a8token"))
    told = step_errors(report)
    assert [step.steps for step in told] == ["sparsegpt", "sparsegpt + gptq", "sparsegpt + gptq + lorc"]
    smoothed = report["compression"]["sites"]
    assert smoothed
    assert all(row["step"] == "smoothquant" and row["error"] < row["error_before"] for row in smoothed)
    found = logits(hfquant.load(tmp_path, dtype=torch.float32))
    original = logits(hfquant.load(tmp_path, dtype=torch.float32).dequantize())
    assert torch.isfinite(found).all()
    assert 0 < relative(found, original) < 0.1  # inputs are rounded, beside what dequantize leaves


@pytest.mark.parametrize("whole", [False, True], ids=["sparsegpt-50", "sparsegpt-2of4+rtn"])
def test_ratios_are_those_of_the_layers_they_name(whole: bool, built: Callable[[str], Path], tmp_path: Path) -> None:
    """By roles, ranges and full names, as `keep` has them; a layer that is left out is stored without a mask."""
    name, ratios = (
        ("sparsegpt-2of4+rtn-w4g32", "{'@blocks:1:': 0}")
        if whole
        else ("sparsegpt-50", "{'@blocks:0': 0.25, 'model.layers.1.mlp.*': 0.75, '@attention:-1': 0}")
    )
    recipe = Recipe.parse(name, [f"sparsegpt.ratios={ratios}"])
    results = {r.name.removesuffix(".weight"): r for r in compress(built("llama"), recipe, tmp_path, **SETTINGS)}

    def share(layer: str) -> float:
        Q = hfquant.load(tmp_path).get_submodule(layer).quantized()
        return 0.0 if Q.mask is None else 1 - float(Q.mask.float().mean())

    first, last = "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"
    if whole:
        assert share(first) == 0.5
        assert share(last) == share("model.layers.1.mlp.up_proj") == 0
        assert "2of4" in results[first].encoding
        assert "2of4" not in results[last].encoding
    else:
        assert share(first) == pytest.approx(0.25, abs=1e-3)
        assert share("model.layers.1.mlp.up_proj") == pytest.approx(0.75, abs=1e-3)
        assert share("model.layers.1.self_attn.q_proj") == pytest.approx(0.5, abs=1e-3)
        assert "kept" not in results[last].encoding
    assert torch.isfinite(logits(hfquant.load(tmp_path))).all()

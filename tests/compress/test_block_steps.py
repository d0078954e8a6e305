"""Steps for whole blocks in the whole machinery: what they change lands in the checkpoint, and nothing else does."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfquant
from hfquant.compress import compress
from tests import families
from tests.compress.folders import digests
from tests.compress.test_resume import SETTINGS, whole
from tests.model.test_families import dense, replaced, tensors

SMOOTH: dict[str, Any] = {"steps": [{"method": "smoothquant", "alpha": 0.5}, {"method": "rtn"}], "grid": "w8g32"}
# parameters that are not compressed, of a block of each family, in which factors end up
CARRIED = {
    "llama": {"input_layernorm.weight", "post_attention_layernorm.weight"},
    "gemma3": {"input_layernorm.weight", "pre_feedforward_layernorm.weight"},
    "gpt2": {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.bias"},
    "opt": {
        f"{n}.{p}" for n in ("self_attn_layer_norm", "final_layer_norm") for p in ("weight", "bias")
    } | {"self_attn.v_proj.bias", "fc1.bias"},
    "bart": {"self_attn.v_proj.bias", "encoder_attn.v_proj.bias"},
    "mixtral": {"input_layernorm.weight"},
}  # fmt: skip


@pytest.mark.parametrize("family", CARRIED)
def test_changed_norms_and_biases_are_written_and_all_else_is_carried(
    family: str, uneven: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = uneven(family), tmp_path / "out"
    list(compress(source, SMOOTH | {"dtype": "keep", "format": "native"}, out, samples=8, seq_len=64))
    before, after = tensors(source), tensors(out)
    gone = replaced(family, set(before))
    rest = set(before) - gone
    assert set(before) - set(after) <= gone
    changed = {name for name in rest if not torch.equal(before[name], after[name])}
    inside = {name for name in rest if re.search(r"\.(layers|h)\.\d+\.", name)}
    assert changed == {n for n in inside if any(n.endswith(f".{leaf}") for leaf in CARRIED[family])}
    assert {name: before[name].dtype for name in rest} == {name: after[name].dtype for name in rest}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3"])
@pytest.mark.parametrize("alpha", [0.5, None])
def test_the_checkpoint_computes_what_the_model_did(
    family: str, alpha: float | None, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """8 bit and rescaled, loaded again: the logits are the original's, as close as without rescaling."""
    source, windows = built(family), families.held_out(4)
    original = dense(family, source)
    apart = {}
    for name, steps in (("plain", []), ("smooth", [{"method": "smoothquant", "alpha": alpha, "steps": 2}])):
        recipe = {"steps": [*steps, {"method": "rtn"}], "grid": "w8g32", "dtype": "keep", "format": "native"}
        list(compress(source, recipe, tmp_path / name, samples=8, seq_len=64))
        with torch.no_grad():
            model = hfquant.load(tmp_path / name, dtype=torch.float32)
            wanted = original(windows).logits
            apart[name] = float((model(windows).logits - wanted).norm() / wanted.norm())
    assert 0 < apart["smooth"] < 2 * apart["plain"]


@pytest.mark.parametrize("recipe", [{"method": "smoothquant", "steps": 2}, {"method": "awq", "steps": 3}])
def test_stopped_and_gone_on_it_ends_in_the_same_bytes(
    recipe: dict[str, Any], built: Callable[[str], Path], tmp_path: Path
) -> None:
    both = {"steps": [recipe, {"method": "gptq"}], "grid": "w4g32"}
    for count, _ in enumerate(compress(built("llama"), both, tmp_path / "out", **SETTINGS), 1):
        if count == 9:  # in the second of three blocks
            break
    list(compress(built("llama"), both, tmp_path / "out", **SETTINGS))
    list(compress(built("llama"), both, tmp_path / "calm", **SETTINGS))
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")
    sites = hfquant_report(tmp_path / "out")["compression"]["sites"]
    assert sites == hfquant_report(tmp_path / "calm")["compression"]["sites"]
    assert {site["block"] for site in sites} == {f"model.layers.{i}" for i in range(3)}


def hfquant_report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_change_no_byte(built: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "smooth.yaml"
    recipe.write_text("steps: [{method: smoothquant, steps: 2}, {method: gptq}]\ngrid: w4g32\n")
    random_ = random.Random(0)
    finished, seconds = whole(built("opt"), str(recipe), tmp_path / "calm")
    assert finished
    for i in range(2):
        out = tmp_path / f"killed{i}"
        finished, _ = whole(built("opt"), str(recipe), out, random_.uniform(0, seconds))
        assert finished or whole(built("opt"), str(recipe), out)[0]
        assert digests(out) == digests(tmp_path / "calm")


def test_a_model_in_memory_is_rescaled_too(trained: Callable[[str], Path]) -> None:
    """What `from_pretrained` does with such a recipe is what the command does: norms changed, output kept."""
    import hfquant.plugin  # noqa: F401
    from hfquant.compress.resident import compress_model
    from hfquant.compress.selection import select
    from hfquant.recipe import Recipe

    model = AutoModelForCausalLM.from_pretrained(trained("llama"), dtype=torch.float32).eval()
    norm = model.model.layers[0].input_layernorm.weight.clone()
    windows = families.held_out(8)
    with torch.no_grad():
        before = model(windows).logits
    recipe = Recipe.parse(SMOOTH)
    names = {name for name, _ in compress_model(model, recipe, select(model, recipe), [windows], torch.float32)}
    assert len(names) == 21
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    with torch.no_grad():
        after = model(windows).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.02

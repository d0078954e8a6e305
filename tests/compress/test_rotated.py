"""Rotated models through the whole work: loaded, resumed, better where outliers are, refused where that is due."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hfquant
from benchmarks.outliers import plant
from hfquant import HfQuantConfig
from hfquant.compress import compress, plan
from hfquant.errors import RecipeError, SourceError
from hfquant.measure.evaluate import perplexity
from hfquant.model.blocks import weights
from hfquant.model.rotation import rotated
from hfquant.model.source import open_source
from hfquant.recipe import Recipe
from tests import families
from tests.compress.folders import digests
from tests.model.test_rotation import write

SETTINGS = {"samples": 8, "seq_len": 64}


def done(model: Path, recipe: str, out: Path, *changes: str) -> dict[str, Any]:
    """Compress, nothing but the recipe's numbers rounded -> the report."""
    list(compress(model, Recipe.parse(recipe, ["dtype=float32", *changes]), out, **SETTINGS))
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def apart(folder: Path, original: Path) -> float:
    ids = families.held_out(4)
    with torch.no_grad():
        was = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)(ids).logits
        now = hfquant.load(str(folder), dtype=torch.float32)(ids).logits
    return float((now - was).norm() / was.norm())


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_rotated_model_loads_and_says_what_became_of_its_head(
    family: str, uneven: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = uneven(family)
    report = done(folder, "rotate+rtn-w8g32", tmp_path / "out")
    plain = done(folder, "rtn-w8g32", tmp_path / "plain")
    assert 0 < apart(tmp_path / "out", folder) < 1.5 * apart(tmp_path / "plain", folder)
    table = 4 * families.VOCABULARY * 64
    assert report["compression"]["rewritten"]["untied_bytes"] == table
    assert 0 < report["compression"]["rewritten"]["error"] < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert report["source"] == plain["source"]
    assert report["output"]["bytes"] - plain["output"]["bytes"] == pytest.approx(table, rel=0.02)


def test_the_estimate_counts_the_head(uneven: Callable[[str], Path], tmp_path: Path) -> None:
    sizes = [
        plan(uneven("llama-tied"), Recipe.parse(name, ["dtype=float32"]), tmp_path / "o", **SETTINGS).estimate
        for name in ("rtn-w8g32", "rotate+rtn-w8g32")
    ]
    assert sizes[1].bytes_after - sizes[0].bytes_after == 4 * families.VOCABULARY * 64
    assert sizes[1].bytes_before == sizes[0].bytes_before


@pytest.mark.parametrize("stop", [3, 8, 16])
def test_a_stopped_run_ends_in_the_same_bytes(stop: int, built: Callable[[str], Path], tmp_path: Path) -> None:
    model, recipe = built("llama-tied"), "rotate+gptq-w4g32"
    for count, _ in enumerate(compress(model, recipe, tmp_path / "out", **SETTINGS), 1):
        if count == stop:
            break
    assert plan(model, recipe, tmp_path / "out", **SETTINGS).resumed == stop // 7
    list(compress(model, recipe, tmp_path / "out", **SETTINGS))
    list(compress(model, recipe, tmp_path / "calm", **SETTINGS))
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")


def test_without_values_no_text_is_needed(built: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.parse("rotate+rtn-w4", ["rotate.values=false"])
    assert not recipe.needs_calibration
    assert Recipe.parse("rotate+rtn-w4").needs_calibration
    list(compress(built("llama"), recipe, tmp_path / "out"))


@pytest.fixture(scope="module")
def outliers(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained Llama, four channels of what its norms put out 50 times larger; it computes the same."""
    folder = tmp_path_factory.mktemp("outliers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained("llama"), dtype=torch.float32).eval()
    assert plant(model, families.held_out(2), channels=4, factor=50.0) == 6
    model.save_pretrained(folder)
    families.byte_tokenizer().save_pretrained(folder)
    return folder


def spread(folder: Path) -> float:
    """How many times larger the largest channel of the inputs of q, k, v, gate and up is than the median one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[float] = []

    def look(module: Any, args: tuple[Tensor, ...]) -> None:
        each = args[0].abs().flatten(0, -2).amax(0)
        found.append(float(each.max() / each.median()))

    for block in model.model.layers:
        for weight in weights(block):
            if weight.module.split(".")[-1] in ("q_proj", "gate_proj"):
                block.get_submodule(weight.module).register_forward_pre_hook(look)
    with torch.no_grad():
        model(families.held_out(4))
    assert len(found) == 6
    return max(found)


def test_no_channel_is_large_any_more(outliers: Path, tmp_path: Path) -> None:
    """64 channels that are sums of many with random signs: the largest of them is below 3 times the median."""
    assert spread(outliers) > 20
    assert spread(write(rotated(open_source(outliers), seed=0), tmp_path / "rotated")) < 3


def test_large_channels_of_the_stream_itself_are_spread(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """Not only those that norms make: here the embeddings and all writers have one 30 times larger than the others.
    Behind a norm that is 8 times the root of the mean square at most, of 64 channels.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(trained("llama"), dtype=torch.float32).eval()
    model.model.embed_tokens.weight.data[:, 5] *= 30
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[5] *= 30
        layer.mlp.down_proj.weight.data[5] *= 30
    model.save_pretrained(tmp_path / "model")
    assert spread(tmp_path / "model") > 5
    assert spread(write(rotated(open_source(tmp_path / "model"), seed=0), tmp_path / "rotated")) < 3


@pytest.mark.parametrize("recipe", ["rtn-w8a4", "gptq-w4a4", "rtn-w3", "gptq-w3"])
def test_outliers_cost_nothing_after_a_rotation(recipe: str, outliers: Path, tmp_path: Path) -> None:
    """They were moved from weights into norms; rotated, those gains are back in the weights.  So what is left of the
    loss is that of a model without outliers: below a quarter of what it was, where inputs are rounded.
    """
    windows = families.held_out(48)
    original = perplexity(transformers.AutoModelForCausalLM.from_pretrained(outliers), windows).perplexity
    lost = []
    for name in (recipe, f"rotate+{recipe}"):
        out = tmp_path / name
        done(outliers, name, out)
        lost.append(perplexity(hfquant.load(str(out), dtype=torch.float32), windows).perplexity - original)
    assert 0 < lost[1] < lost[0] * (0.25 if "a4" in recipe else 1)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (("gptq", "rotate"), "`rotate` rewrites the whole model, and has to come before `gptq`"),
        (("smoothquant", "rotate", "gptq"), "has to come before `smoothquant`"),
        (("rotate", "rotate", "gptq"), "`rotate` is there twice"),
    ],
)
def test_it_comes_first_and_once(steps: tuple[str, ...], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Recipe.parse({"steps": [{"method": step} for step in steps], "grid": "w4g32"})


def test_a_rotation_of_nothing_is_refused() -> None:
    step = {"method": "rotate", "stream": False, "values": False}
    with pytest.raises(RecipeError, match="it does nothing"):
        Recipe.parse({"steps": [step, {"method": "rtn"}], "grid": "w4g32"})


def test_models_in_memory_are_not_rotated_as_a_whole() -> None:
    with pytest.raises(RecipeError, match=r"rewrites the whole model[^\n]*\n\nhint: use `hfquant compress`"):
        HfQuantConfig("rotate+gptq-w4g32")
    values = {"steps": [{"method": "rotate", "stream": False}, {"method": "gptq"}], "grid": "w4g32"}
    assert HfQuantConfig(values).recipe.steps[0].method == "rotate"


def test_refused_before_work_starts(uneven: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be rotated"):
        plan(uneven("bloom"), "rotate+gptq-w4g32", tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    values = Recipe.parse("rotate+gptq-w4g32", ["rotate.stream=false"])
    assert plan(uneven("bloom"), values, tmp_path / "out", **SETTINGS).estimate.bytes_after > 0

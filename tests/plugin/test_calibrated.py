"""Recipes that look at activations, applied to a model while it is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hfquant.errors import CalibrationError, RecipeError, ResourceError
from hfquant.plugin import HfQuantConfig, load
from tests.families import byte_tokenizer, linears

from .models import TEXT, TOKENS, load_with_transformers, logits, packed, quantization_config, relative

Dense = Callable[[str], Path]
WINDOWS = TOKENS[: 8 * 64].view(8, 64)


def request(format: str = "auto", grid: str = "w4g32", **more: object) -> HfQuantConfig:
    recipe = {"steps": [{"method": "gptq", "search": 5, "refine": 0}], "grid": grid, "format": format}
    return HfQuantConfig(recipe, **more)


@pytest.mark.parametrize(
    ("family", "format"),
    [("llama", "compressed_tensors"), ("gpt2", "gptq"), ("t5", "native"), ("bart", "native"), ("mixtral", "native"),
     ("mixtral", "compressed_tensors")],
)  # fmt: skip
def test_compressed_after_loading_saved_and_loaded_again(
    family: str, format: str, dense: Dense, tmp_path: Path
) -> None:
    config = request(format, calibration=[WINDOWS[:4], WINDOWS[4:]])
    model = load_with_transformers(family, dense(family), quantization_config=config)
    layers = {n.rpartition(".experts.")[0] + ".experts" if ".experts." in n else n for n in linears(family)}
    assert packed(model) == layers
    first = logits(model)
    assert 0 < relative(first, logits(load_with_transformers(family, dense(family)))) < 0.6
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), first)


def test_calibration_makes_a_difference_and_is_not_copied(dense: Dense) -> None:
    batches = [WINDOWS]
    config = request(calibration=batches)
    model = load_with_transformers("llama", dense("llama"), quantization_config=config)
    assert config.batches is batches
    assert model.config.quantization_config.batches is batches
    rtn = load_with_transformers("llama", dense("llama"), quantization_config=HfQuantConfig("rtn-w4g32"))
    layer = "model.layers.0.mlp.down_proj"
    assert not torch.equal(model.get_submodule(layer).quantized().codes, rtn.get_submodule(layer).quantized().codes)


@pytest.mark.parametrize("source", ["default", "texts", "file", "self", "random"])
def test_where_the_text_comes_from(source: str, dense: Dense, tmp_path: Path) -> None:
    text = TEXT
    (tmp_path / "text.txt").write_text(text, "utf-8")
    given = {"default": None, "texts": [text[:2000], text[2000:]], "file": tmp_path / "text.txt"}
    config = request(calibration=given.get(source, source), samples=4, seq_len=32)
    model = load_with_transformers("llama", dense("llama"), quantization_config=config)
    model.save_pretrained(tmp_path / "a")
    assert quantization_config(tmp_path / "a")["quant_method"] == "compressed-tensors"


def test_the_users_tokenizer_is_used(dense: Dense, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((dense("llama") / name).read_bytes())
    config = request(calibration=[TEXT[:2000]], samples=4, seq_len=32, tokenizer=byte_tokenizer())
    assert packed(load_with_transformers("llama", bare, quantization_config=config))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "list of texts"),
        ([torch.ones(2, 8)], "int64"),
        ([torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)], "differ in length"),
        (["short"], "less than one sample"),
    ],
)
@pytest.mark.parametrize("recipe", ["gptq-w4g32", "rtn-w8a8static"])
def test_unusable_calibration(
    recipe: str, calibration: list[object], message: str, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", unreadable)
    config = HfQuantConfig(recipe, calibration=calibration)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=message):
        load_with_transformers("llama", dense("llama"), quantization_config=config)


@pytest.mark.parametrize(("more", "said"), [({"calibration": ""}, "names no text"), ({"samples": 0}, "samples")])
def test_static_scales_need_something_to_be_measured_on(more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        HfQuantConfig("rtn-w8a8static", **more)


def test_a_text_file_that_is_not_there_is_told_before_a_weight_is_read(
    dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", unreadable)
    config = HfQuantConfig("rtn-w8a8static", calibration=tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="does not exist"):
        load_with_transformers("llama", dense("llama"), quantization_config=config)


def unreadable(*_: object, **__: object) -> None:
    raise AssertionError("weights are read")


def test_several_devices_are_refused(dense: Dense) -> None:
    places = {"model": "cpu", "lm_head": "meta"}
    with pytest.raises(ResourceError, match="one device"):
        load_with_transformers("llama", dense("llama"), quantization_config=request(), device_map=places)


def test_dequantize_afterwards(dense: Dense) -> None:
    model = load_with_transformers("mixtral", dense("mixtral"), quantization_config=request(calibration=[WINDOWS]))
    first = logits(model)
    assert relative(logits(model.dequantize()), first) < 1e-5

"""HfQuantConfig: a request, and the description of a compressed model."""

import copy
import json

import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from hfquant.errors import FormatError, RecipeError
from hfquant.plugin import HfQuantConfig
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.formats import Wire
from hfquant.tensors.grid import Grid


def test_calibration_is_neither_copied_nor_written() -> None:
    batches = [torch.ones(1, 8, dtype=torch.int64)]
    config = HfQuantConfig("gptq-w4g64", calibration=batches, tokenizer=object())
    again = copy.deepcopy(copy.deepcopy(config))
    assert again.batches is batches
    assert again.tokenizer is config.tokenizer
    assert "batches" not in json.dumps(config.to_dict())
    assert "tensor" not in repr(config)


def test_a_request_survives_json() -> None:
    config = HfQuantConfig("rtn-w3g64", samples=8, seq_len=64, seed=3, modules_to_not_convert=["up_proj"])
    again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert isinstance(again, HfQuantConfig)
    assert again.recipe == config.recipe
    assert again.wire is None
    assert (again.recipe.calibration.samples, again.recipe.calibration.seed) == (8, 3)
    assert again.recipe.grid_for("model.layers.0.mlp.up_proj") is None
    assert again.recipe.grid_for("model.layers.0.mlp.down_proj") is not None


def test_calibration_source_goes_into_the_recipe() -> None:
    assert HfQuantConfig("gptq-w4g64", calibration="self").recipe.calibration.source == "self"


@pytest.mark.parametrize("format", formats.NAMES)
def test_a_compressed_model_is_described_by_the_formats_own_dict(format: str) -> None:
    layers = {"*": Grid(4, 32, True)} if format != "native" else {"model.layers.0.fc1": Grid(5, 32, False)}
    wire = Wire(format=format, layers=layers, ignore=("lm_head",))
    written = formats.load(format).config(wire)
    config = HfQuantConfig.from_dict({"quant_method": "hfquant", "checkpoint": written})
    assert config.to_dict() == written
    assert config.wire is not None
    assert config.wire.layers == {name: Encoding(grid) for name, grid in layers.items()}
    assert dict(config) == written


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(FormatError, match="awq"):
        HfQuantConfig.from_dict({"quant_method": "hfquant", "checkpoint": {"quant_method": "awq"}})
    with pytest.raises(FormatError, match="version 99"):
        HfQuantConfig.from_dict({"quant_method": "hfquant", "format": "native", "version": 99})


def test_a_wrong_recipe_is_an_error_at_once() -> None:
    with pytest.raises(RecipeError, match="unknown method `gtpq`"):
        HfQuantConfig("gtpq-w4g64")
    with pytest.raises(RecipeError, match="not `gptq`"):
        HfQuantConfig(quant_method="gptq")

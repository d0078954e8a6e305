"""A dense model, compressed while it is loaded; saved; loaded again."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hfquant.errors import FormatError, RecipeError, ResourceError
from hfquant.plugin import HfQuantConfig, load
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer
from tests.families import linears

from .models import (
    GRIDS,
    IDS,
    MATRIX,
    load_with_transformers,
    logits,
    packed,
    quantization_config,
    relative,
    request,
    same_tensors,
    stored,
)

Dense = Callable[[str], Path]


@pytest.mark.parametrize("family", MATRIX)
def test_compressed_on_load_saved_and_loaded_again(family: str, dense: Dense, tmp_path: Path) -> None:
    original = load_with_transformers(family, dense(family))
    model = load_with_transformers(family, dense(family), quantization_config=request("native", "w8g32"))
    assert packed(model) == {re.sub(r"experts\..*", "experts", name) for name in linears(family)}
    first = logits(model)
    # a router of random experts may decide otherwise for a token
    assert 0 < relative(first, logits(original)) < (0.25 if family in ("mixtral", "qwen3_moe") else 0.05)
    assert model.get_memory_footprint() < original.get_memory_footprint()

    model.save_pretrained(tmp_path / "a")
    again = load_with_transformers(family, tmp_path / "a")
    assert torch.equal(logits(again), first)
    again.save_pretrained(tmp_path / "b")
    assert same_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert quantization_config(tmp_path / "a") == quantization_config(tmp_path / "b")


@pytest.mark.parametrize("format", GRIDS)
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_every_format_comes_back_the_same(family: str, format: str, dense: Dense, tmp_path: Path) -> None:
    config = request(format, GRIDS[format])
    model = load_with_transformers(family, dense(family), quantization_config=config)
    first = logits(model)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(logits(again), first)
    again.save_pretrained(tmp_path / "b")
    assert same_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


@pytest.mark.parametrize(
    ("family", "grid", "method"),
    [
        ("llama", "w4g32sym", "compressed-tensors"),
        ("llama", "w8", "compressed-tensors"),
        ("llama", "w3g32", "gptq"),
        ("llama", "w5g32", "hfquant"),
        ("gpt2", "w4g32sym", "gptq"),  # compressed-tensors knows no Conv1D
        ("mixtral", "w4g32sym", "compressed-tensors"),
        ("mixtral", "w3g32", "hfquant"),  # gptq knows no fused experts
        ("llama", "w4g48sym", "hfquant"),  # 64 columns are no multiple of 48
    ],
)
def test_the_most_widely_readable_format_is_chosen(
    family: str, grid: str, method: str, dense: Dense, tmp_path: Path
) -> None:
    model = load_with_transformers(family, dense(family), quantization_config=request("auto", grid))
    model.save_pretrained(tmp_path)
    assert quantization_config(tmp_path)["quant_method"] == method
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_codes_are_those_of_the_method(family: str, dense: Dense) -> None:
    recipe = {"steps": [{"method": "rtn", "search": 10}], "grid": "w3g48", "format": "native"}
    model = load_with_transformers(family, dense(family), quantization_config=HfQuantConfig(recipe))
    original = load_with_transformers(family, dense(family))
    from hfquant.methods.rtn import Method

    for name in packed(model):
        source = original.get_submodule(name)
        W = source.weight if isinstance(source, nn.Linear) else source.weight.T
        Q = Method(search=10)(Layer(name=name, W=W.detach()), Grid(3, 48, False), torch.float16).Q
        mine = model.get_submodule(name).quantized()
        assert Q is not None
        assert torch.equal(mine.codes, Q.codes)
        assert torch.equal(mine.scale, Q.scale)
        assert torch.equal(mine.zero_point, Q.zero_point)


def test_a_half_precision_checkpoint_keeps_its_scales_whatever_it_is_loaded_as(
    dense: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_with_transformers("llama", dense("llama", torch.bfloat16), quantization_config=request())
    model.save_pretrained(tmp_path / "a")
    scales = {v.dtype for k, v in stored(tmp_path / "a").items() if k.endswith("scale")}
    assert scales == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float32):
        again = load(tmp_path / "a", dtype=dtype)
        assert again.model.embed_tokens.weight.dtype == dtype
        again.save_pretrained(tmp_path / "b")
        b = {k: v for k, v in stored(tmp_path / "b").items() if ".weight_" in k}
        assert same_tensors(b, {k: v for k, v in stored(tmp_path / "a").items() if ".weight_" in k})


def test_overrides_and_modules_to_keep(dense: Dense) -> None:
    recipe = {"steps": [{"method": "rtn"}], "grid": "w4g32", "overrides": {"*.down_proj": "w8g32", "*.o_proj": None}}
    config = HfQuantConfig(recipe, modules_to_not_convert=["layers.1", "up_proj"])
    model = load_with_transformers("llama", dense("llama"), quantization_config=config)
    names = packed(model)
    assert "model.layers.0.mlp.gate_proj" in names
    assert not {n for n in names if "layers.1." in n or n.endswith(("up_proj", "o_proj"))}
    assert model.model.layers[0].mlp.down_proj.grid.bits == 8
    assert "lm_head" not in names


def test_nothing_to_compress_is_an_error(dense: Dense) -> None:
    config = HfQuantConfig("rtn-w4g64", modules_to_not_convert=["model"])
    with pytest.raises(RecipeError, match="leaves every layer"):
        load_with_transformers("llama", dense("llama"), quantization_config=config)


def test_a_format_that_cannot_say_it_is_an_error(dense: Dense) -> None:
    with pytest.raises(FormatError, match="cannot store"):
        load_with_transformers("gpt2", dense("gpt2"), quantization_config=request("compressed_tensors"))


@pytest.mark.parametrize("devices", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_on_load_with_disk_offload_is_refused(devices: object, dense: Dense, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="offloaded to disk"):
        load_with_transformers(
            "llama", dense("llama"), quantization_config=request(), device_map=devices, offload_folder=tmp_path
        )


@pytest.mark.parametrize("family", ["llama-tied", "t5", "bart", "gpt2"])
def test_embeddings_stored_once_and_used_twice(family: str, dense: Dense, tmp_path: Path) -> None:
    config = request("native", "w8g32", embeddings="w8g32")
    model = load_with_transformers(family, dense(family), quantization_config=config)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert all(table._parameters[c] is head._parameters[c] for c in table.components)
    first = logits(model)
    assert relative(first, logits(load_with_transformers(family, dense(family)))) < 0.05
    model.save_pretrained(tmp_path)
    again = load_with_transformers(family, tmp_path)
    table, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert all(table._parameters[c] is head._parameters[c] for c in table.components)
    assert torch.equal(logits(again), first)


def test_a_dict_does_as_well_as_a_config(dense: Dense) -> None:
    asked = {"quant_method": "hfquant", "recipe": "rtn-w4g64"}
    model = load_with_transformers("llama", dense("llama"), quantization_config=asked)
    assert len(packed(model)) == len(linears("llama"))


def test_the_users_config_can_be_used_again(dense: Dense) -> None:
    config = request()
    models = [load_with_transformers(f, dense(f), quantization_config=config) for f in ("llama", "opt")]
    assert config.wire is None
    wires = [model.config.quantization_config.wire for model in models]
    assert wires[0].layers.keys().isdisjoint(wires[1].layers)


def test_generation(dense: Dense) -> None:
    model = load_with_transformers("llama", dense("llama"), quantization_config=request())
    assert model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False).shape == (2, 8)

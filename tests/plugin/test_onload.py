"""A dense model, compressed while it is loaded; saved; loaded again."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from hfquant.errors import FormatError, RecipeError, ResourceError
from hfquant.methods.rtn import Method as Rtn
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
    for name in packed(model):
        source = original.get_submodule(name)
        W = source.weight if isinstance(source, nn.Linear) else source.weight.T
        Q = Rtn(search=10)(Layer(name=name, W=W.detach()), Grid(3, 48, False), torch.float16).Q
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


@pytest.mark.parametrize(
    "where",
    [
        {"device_map": {"": "disk"}},
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 150_000}},  # known only when transformers has worked it out
    ],
    ids=["all", "some", "auto"],
)
def test_on_load_with_disk_offload_is_refused(where: dict[str, Any], dense: Dense, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="offloaded to disk"):
        load_with_transformers("llama", dense("llama"), quantization_config=request(), offload_folder=tmp_path, **where)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_fails_in_the_middle_arrives_as_it_is(family: str, dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    call, seen = Rtn.__call__, list[str]()

    def failing(self: Rtn, layer: Layer, *args: Any) -> Layer:
        seen.append(layer.name)
        if len(seen) == 3:
            raise FormatError("the third is too much", "leave it out")
        return call(self, layer, *args)

    monkeypatch.setattr(Rtn, "__call__", failing)
    with pytest.raises(FormatError, match="the third is too much") as caught:
        load_with_transformers(family, dense(family), quantization_config=request())
    assert caught.value.hint == "leave it out"
    (note,) = caught.value.__notes__
    assert f"`{seen[2]}" in note
    assert len(seen) == 3, "nothing is compressed any more"


@pytest.mark.parametrize("recipe", ["rtn-w8g32", "gptq-w8g32"])
@pytest.mark.parametrize("family", ["t5", "flan-t5"])
def test_what_a_model_keeps_in_float32_is_left_alone(family: str, recipe: str, dense: Callable[..., Path]) -> None:
    """T5's `wo` overflows in float16; in bfloat16 it does not."""
    wo = {name for name in linears(family) if name.endswith(".wo")}
    assert wo
    for dtype, kept in ((torch.float16, wo), (torch.bfloat16, set())):
        config = HfQuantConfig(recipe, calibration=[IDS.repeat(1, 6)] if recipe.startswith("gptq") else None)
        model = load_with_transformers(family, dense(family), quantization_config=config, dtype=dtype)
        assert packed(model) == linears(family) - kept
        types = {model.get_submodule(name).weight.dtype for name in kept}
        assert types == ({torch.float32} if kept else set())


@pytest.mark.parametrize("size", ["tp_size", "ep_size"])
@pytest.mark.parametrize("compressed", [False, True])
def test_parallelism_within_weights_is_refused(
    compressed: bool, size: str, dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = dense("llama"), {"quantization_config": request("native")}
    if compressed:
        load_with_transformers("llama", folder, **given).save_pretrained(tmp_path)
        folder, given = tmp_path, {}
    asked = DistributedConfig(tp_size=2, **({} if size == "tp_size" else {"ep_size": 2}))
    if size == "ep_size":
        asked.tp_size = 1
    # as transformers hands it on, without other processes
    monkeypatch.setattr(PreTrainedModel, "prepare_distribute_model", lambda asked, device_map: (asked, None, None))
    with pytest.raises(ResourceError, match="tensor or expert parallelism") as caught:
        load_with_transformers("llama", folder, distributed_config=asked, **given)
    assert "device_map" in str(caught.value.hint)


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

"""Checkpoints that are compressed already: what they hold, what breaks them, where they may lie."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hfquant
from hfquant.errors import CheckpointError, FormatError
from hfquant.plugin import HfQuantConfig, load
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

from .models import (
    GRIDS,
    IDS,
    load_with_transformers,
    logits,
    packed,
    quantization_config,
    relative,
    request,
    same_tensors,
    stored,
)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(dense: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A compressed checkpoint of a family in a format, made once."""
    folder = tmp_path_factory.mktemp("compressed")

    def get(family: str, format: str = "native", grid: str | None = None) -> Path:
        grid = grid or GRIDS[format]
        out = folder / f"{family}-{format}-{grid}"
        if not out.exists():
            config = request(format, grid, steps=[{"method": "rtn", "search": 0}])
            load_with_transformers(family, dense(family), quantization_config=config).save_pretrained(out)
        return out

    return get


def edited(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, out)
    tensors = stored(source)
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


@pytest.mark.parametrize("format", GRIDS)
def test_written_by_another_and_read_by_us(format: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint put together by hand from the format's definition alone."""
    grid = {"compressed_tensors": Grid(4, 32, True), "gptq": Grid(4, 32, True), "native": Grid(6, 24, False)}[format]
    tensors, original = stored(dense("llama")), load_with_transformers("llama", dense("llama"))
    fmt = formats.load(format)
    names = [n for n in tensors if n.endswith("_proj.weight")]
    for name in names:
        W = tensors.pop(name)
        scale, zero = grid.fit(W)
        Q = Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)
        original.get_parameter(name).data.copy_(Q.dequantize())
        tensors |= {f"{name.removesuffix('.weight')}.{c}": t for c, t in fmt.pack(Q).items()}
    wire = formats.Wire(format=format, layers={n.removesuffix(".weight"): grid for n in names}, ignore=("lm_head",))
    config = json.loads((dense("llama") / "config.json").read_text("utf-8"))
    config["quantization_config"] = fmt.config(wire) | ({} if format == "native" else {"unknown": [1, 2]})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})

    model = load(tmp_path / "a")
    assert packed(model) == {n.removesuffix(".weight") for n in names}
    assert relative(logits(model), logits(original)) < 1e-5
    model.save_pretrained(tmp_path / "b")
    assert same_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert quantization_config(tmp_path / "b") == config["quantization_config"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_patterns_of_modules_left_dense(make: Make, dense: Callable[[str], Path], tmp_path: Path) -> None:
    """llm-compressor writes regular expressions."""
    names = [n for n in stored(dense("llama")) if n.endswith("down_proj.weight")]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            for component in ("packed", "scale", "shape"):
                del tensors[f"{name}_{component}"]
            tensors[name] = stored(dense("llama"))[name]

    folder = edited(make("llama", "compressed_tensors"), tmp_path / "a", change)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["ignore"] = ["lm_head", r"re:.*\.mlp\.down_proj$"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert not [n for n in packed(load(folder)) if n.endswith("down_proj")]
    assert [n for n in packed(load(folder)) if n.endswith("up_proj")]


def test_lazily_exported() -> None:
    assert hfquant.load is load
    assert hfquant.HfQuantConfig is HfQuantConfig


def test_a_dense_checkpoint_is_not_ours(dense: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="not compressed"):
        load(dense("llama"))


def test_another_quantization_is_named(make: Make, tmp_path: Path) -> None:
    shutil.copytree(make("llama"), tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "a/config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(FormatError, match="awq"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "lost", ["mlp.up_proj.weight_scale", "mlp.up_proj.weight", "self_attn.q_proj.weight_zero_point"]
)
def test_a_missing_tensor_is_an_error(lost: str, make: Make, tmp_path: Path) -> None:
    name = f"model.layers.1.{lost}"
    folder = edited(make("llama"), tmp_path / "a", lambda tensors: drop(tensors, name))
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "format", "lost", "named"),
    [
        ("t5", "native", "encoder.block.1.layer.1.DenseReluDense.wo.weight_scale", None),
        ("t5", "compressed_tensors", "decoder.block.0.layer.1.EncDecAttention.q.weight_scale", None),
        ("opt", "gptq", "model.decoder.layers.1.fc1.scales", None),
        # all of a projection's experts: what is made of some of them cannot be taken for whole
        ("mixtral", "compressed_tensors", ".1.block_sparse_moe.experts.*.w2.weight_scale", ".1.mlp.experts.down_proj_"),
        ("mixtral", "native", ".1.block_sparse_moe.experts.*.w2.weight_scale", ".1.mlp.experts.down_proj_scale"),
    ],
)
def test_a_missing_tensor_in_any_family_is_an_error(
    family: str, format: str, lost: str, named: str | None, make: Make, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if fnmatch(name, f"*{lost}")]
        assert names
        for name in names:
            del tensors[name]

    folder = edited(make(family, format, "w4g32sym"), tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=re.escape(named or lost)):
        load(folder)


def test_one_missing_expert_is_an_error(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", "transformers")  # commands that ran in this process want it quiet
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight_scale"
    folder = edited(make("mixtral", "native"), tmp_path / "a", lambda tensors: drop(tensors, lost))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    assert "model.layers.1.mlp.experts.down_proj_scale | MISMATCH" in caplog.text


def test_a_missing_dense_weight_is_an_error_too(dense: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(dense("llama"), tmp_path / "a", lambda tensors: drop(tensors, name))
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("rtn-w4g64"))


def test_a_wrong_shape_is_an_error(make: Make, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(make("llama"), tmp_path / "a", lambda t: t.update({name: t[name][:, :-1].contiguous()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("format", GRIDS)
def test_disk_offload_runs_and_saves_the_same_bytes(format: str, make: Make, tmp_path: Path) -> None:
    folder = make("llama", format)
    first = logits(load(folder))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(folder, device_map=places, offload_folder=tmp_path / "off")
    assert all(p.is_meta for p in model.model.layers[1].mlp.up_proj.parameters())
    assert torch.equal(logits(model), first)
    assert not any((tmp_path / "off").iterdir())  # read from the checkpoint's own files
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "b")
    assert same_tensors(stored(folder), stored(tmp_path / "b"))


def test_disk_offload_of_experts(make: Make, tmp_path: Path) -> None:
    folder = make("mixtral")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(folder, device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(logits(model), logits(load(folder)))


@pytest.mark.parametrize(
    ("family", "format"),
    [("llama", "native"), ("llama", "gptq"), ("gpt2", "native"), ("t5", "compressed_tensors"), ("bart", "native"),
     ("mixtral", "native"), ("mixtral", "compressed_tensors"), ("qwen3_moe", "compressed_tensors")],
)  # fmt: skip
def test_dequantize(
    family: str, format: str, make: Make, dense: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(family, format)
    model = load(folder)
    first = logits(model)
    assert hfquant.dequantize(model) is model
    assert not packed(model)
    assert not hasattr(model.config, "quantization_config")
    assert relative(logits(model), first) < 1e-5
    model.save_pretrained(tmp_path)
    assert stored(tmp_path).keys() == stored(dense(family)).keys()
    assert torch.equal(logits(load_with_transformers(family, tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dequantize_while_loading(family: str, make: Make) -> None:
    folder = make(family)
    first = logits(load(folder))
    asked = load_with_transformers(family, folder, quantization_config=HfQuantConfig(dequantize=True))
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    for model in (asked, load_with_transformers(family, folder, config=config), load(folder, dequantize=True)):
        assert not packed(model)
        assert not hasattr(model.config, "quantization_config")
        assert relative(logits(model), first) < 1e-5


def test_dequantize_to_another_type(make: Make) -> None:
    model = hfquant.dequantize(load(make("llama")), torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_built_from_the_config_alone_is_dense(family: str, make: Make) -> None:
    for config in (AutoConfig.from_pretrained(make(family)), load(make(family)).config):
        model = AutoModelForCausalLM.from_config(config)
        assert not packed(model)
        assert all(p.is_floating_point() for p in model.parameters())
        assert torch.isfinite(logits(model)).all()


def test_a_state_dict_will_do_instead_of_files(make: Make) -> None:
    folder = make("llama")
    model = load(folder)
    config = AutoConfig.from_pretrained(folder)
    again = type(model).from_pretrained(None, config=config, state_dict=stored(folder))
    assert torch.equal(logits(again), logits(model))


def test_experts_are_stored_per_expert_with_their_scales(make: Make) -> None:
    for format, component in (("native", "weight_scale"), ("compressed_tensors", "weight_scale")):
        names = set(stored(make("mixtral", format)))
        prefix = "model.layers.0.block_sparse_moe.experts"
        assert {f"{prefix}.{e}.{w}.{component}" for e in range(4) for w in ("w1", "w2", "w3")} <= names
        assert not [n for n in names if "gate_up_proj" in n]
    shapes = stored(make("mixtral", "compressed_tensors"))
    assert shapes[f"{prefix}.1.w3.weight_shape"].tolist() == [96, 64]
    assert shapes[f"{prefix}.1.w2.weight_shape"].tolist() == [64, 96]


@pytest.mark.parametrize("format", ["native", "compressed_tensors"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_come_back_the_same(family: str, format: str, make: Make, tmp_path: Path) -> None:
    folder = make(family, format)
    model = load(folder)
    model.save_pretrained(tmp_path)
    assert same_tensors(stored(folder), stored(tmp_path))
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_stock_transformers_asks_for_the_package_of_a_standard_format(make: Make) -> None:
    from transformers.utils import is_compressed_tensors_available

    if is_compressed_tensors_available():
        model = AutoModelForCausalLM.from_pretrained(make("llama", "compressed_tensors"))
        assert relative(logits(model), logits(load(make("llama", "compressed_tensors")))) < 1e-3
    else:
        with pytest.raises(ImportError, match="compressed"):
            AutoModelForCausalLM.from_pretrained(make("llama", "compressed_tensors"))


def test_generation_from_a_loaded_checkpoint(make: Make) -> None:
    model = load(make("bart"))
    assert model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False).shape[0] == 2


def test_no_dtype_is_lost_on_the_way(make: Make) -> None:
    model = load(make("llama"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
    for method in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized"):
            method()

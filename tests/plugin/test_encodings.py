"""Checkpoints whose layers hold more than a grid: read, run, saved, reloaded, made dense, trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant.plugin import HfQuantConfig, load
from hfquant.runtime.experts import is_experts
from hfquant.tensors import formats
from hfquant.tensors.activations import fake_quantize
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.layer import Quantized
from tests import families
from tests.encoded import encode

from .models import IDS, load_with_transformers, logits, packed, quantization_config, relative, same_tensors, stored

# one after the other over the layers of a model
EVERYTHING = (
    "w4g32sym-2of4-r4-a8token-s",
    "w8sym-a8staticasym",
    "w16sym-kept1800",
    "w3g32-kept1800-r4-s",
    "w4g32-a8g32",
)
WEIGHTS = ("w4g32sym-2of4-r4-s", "w16sym-kept1800", "w3g32-r2")
MODELS = [
    ("llama", "native", EVERYTHING),
    ("llama-tied", "native", ("w4g32sym-2of4-r4-a8tokenasym-s",)),
    ("gpt2", "native", EVERYTHING),
    ("t5", "native", EVERYTHING),
    ("bart", "native", EVERYTHING),
    ("bart", "native", WEIGHTS),
    ("mixtral", "native", ("w4g32sym-2of4-a8token",)),
    ("qwen3_moe", "native", ("w16sym-2of4",)),
    ("llama", "compressed_tensors", ("w8sym-a8token",)),
    ("opt", "compressed_tensors", ("w8sym-a8static", "w8sym-a8staticasym")),
    ("t5", "compressed_tensors", ("w8sym-a8token",)),
    ("mixtral", "compressed_tensors", ("w8sym-a8token",)),
    ("llama", "compressed_tensors", ("w4g32sym-2of4",)),
    ("gpt2", "gptq", ("w4g32sym-kept2000",)),
]


def read_rounded(module: nn.Module, Q: Quantized) -> None:
    """A dense module that computes what Q says."""
    if Q.activations is None:
        return
    s = 1 if Q.input_scale is None else Q.input_scale

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(args[0] / s, Q.activations, Q.activation_scale, Q.activation_zero) * s, *args[1:])

    module.register_forward_pre_hook(hook)


def write(family: str, folder: Path, dense: Path, format: str, texts: tuple[str, ...]) -> PreTrainedModel:
    """A checkpoint made by hand from the formats' definition; returns the dense model that computes the same."""
    model, fmt = load_with_transformers(family, dense), formats.load(format)
    tensors, layers = stored(dense), dict[str, Encoding]()
    ignore = tuple(name for name in ("lm_head", "model.decoder.project_in") if f"{name}.weight" in tensors)
    linears = sorted(n for n in families.linears(family) if f"{n}.weight" in tensors)
    if "moe" in family or family == "mixtral":
        return _experts(model, tensors, folder, dense, format, texts[0])
    for i, name in enumerate(linears):
        module = model.get_submodule(name)
        conv1d, W = type(module).__name__ == "Conv1D", tensors.pop(f"{name}.weight")
        text = texts[i % len(texts)]
        Q = encode(W.T if conv1d else W, Encoding.parse(text))
        D = Q.dequantize()
        module.weight.data.copy_(D.T if conv1d else D)
        read_rounded(module, Q)
        tensors |= {f"{name}.{component}": part for component, part in fmt.pack(Q).items()}
        layers[name] = fmt.keeps(Q.encoding)
    _save(folder, dense, tensors, formats.Wire(format=format, layers=layers, ignore=ignore))
    return model


def _experts(
    model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path, dense: Path, format: str, text: str
) -> PreTrainedModel:
    """The same for fused experts, which are stored one by one; everything else stays dense."""
    fmt, encoding = formats.load(format), Encoding.parse(text)
    layers = {name: fmt.keeps(encoding) for name, module in model.named_modules() if is_experts(module)}
    for name in [n for n in tensors if ".experts." in n]:
        Q = encode(tensors.pop(name), encoding)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{component}": part for component, part in fmt.pack(Q).items()}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            rows = parameter.shape[1] // (2 if "gate_up" in name else 1)
            done = [torch.cat([encode(w, encoding).dequantize() for w in W.split(rows)]) for W in parameter.detach()]
            parameter.data.copy_(torch.stack(done))
    rest = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    _save(folder, dense, tensors, formats.Wire(format=format, layers=layers, ignore=rest))
    return model


def _save(folder: Path, dense: Path, tensors: dict[str, Tensor], wire: formats.Wire) -> None:
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text("utf-8"))
    config["quantization_config"] = formats.load(wire.format).config(wire)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("family", "format", "texts"), MODELS, ids=lambda v: v if isinstance(v, str) else v[0])
def test_read_run_saved_and_read_again(
    family: str, format: str, texts: tuple[str, ...], dense: Callable[[str], Path], tmp_path: Path
) -> None:
    same = write(family, tmp_path / "a", dense(family), format, texts)
    model = load(tmp_path / "a")
    assert packed(model)
    # Where inputs are rounded, a difference of 1e-7 now and then ends in another code, a 127th of the largest value.
    # The inputs of experts are not rounded in `same`.
    assert relative(logits(model), logits(same)) < (0.03 if "-a8" in "".join(texts) else 1e-5)
    model.save_pretrained(tmp_path / "b")
    assert same_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert quantization_config(tmp_path / "b") == quantization_config(tmp_path / "a")
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))
    if format == "native":
        again = load_with_transformers(family, tmp_path / "a")
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_dense_again(family: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    """Everything but the rounding of inputs."""
    same = write(family, tmp_path / "a", dense(family), "native", WEIGHTS)
    model = load(tmp_path / "a", dequantize=True)
    assert not packed(model)
    assert relative(logits(model), logits(same)) < 1e-5
    other = load(tmp_path / "a")
    other.dequantize()
    assert torch.equal(logits(other), logits(model))


def test_in_another_type_what_is_stored_keeps_its_own(dense: Callable[[str], Path], tmp_path: Path) -> None:
    same = write("llama", tmp_path / "a", dense("llama"), "native", EVERYTHING)
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    assert {"weight_rank_scale", "weight_input_scale"} <= set(layer.components)
    assert layer.weight_rank_scale.dtype == layer.weight_input_scale.dtype == torch.float32
    assert layer.weight_scale.dtype == torch.float16
    assert relative(logits(model), logits(same)) < 0.05
    model.save_pretrained(tmp_path / "b")
    mine, theirs = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert all(torch.equal(theirs[name], t) for name, t in mine.items() if "_proj.weight" in name)


def test_adapters_learn_on_top(dense: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    write("llama", tmp_path / "a", dense("llama"), "native", EVERYTHING)
    model = load(tmp_path / "a")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for _ in range(3):
        loss = adapted(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_block_is_one_graph(dense: Callable[[str], Path], tmp_path: Path) -> None:
    write("llama", tmp_path / "a", dense("llama"), "native", EVERYTHING)
    model = load(tmp_path / "a")
    first = logits(model)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, use_cache=False).logits, first)


def test_the_config_on_the_model_says_how_it_is_stored(dense: Callable[[str], Path], tmp_path: Path) -> None:
    write("llama", tmp_path / "a", dense("llama"), "native", EVERYTHING)
    config = load(tmp_path / "a").config.quantization_config
    assert isinstance(config, HfQuantConfig)
    assert config.wire is not None
    assert {str(e) for e in config.wire.layers.values()} == set(EVERYTHING)

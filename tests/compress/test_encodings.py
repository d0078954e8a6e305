"""From a method that decides while it works what is stored, to a config that says what was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hfquant
from hfquant import methods
from hfquant.compress import compress, plan
from hfquant.compress.naming import named_parts
from hfquant.errors import FormatError
from hfquant.measure.layers import layers
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding, Sparsity
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer
from tests.encoded import encode, largest
from tests.families import byte_tokenizer
from tests.plugin.models import load_with_transformers, logits, quantization_config, same_tensors, stored

SETTINGS = {"samples": 4, "seq_len": 64}


@pytest.fixture
def pruning(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a method prune first: every weight below a threshold, or to a pattern."""

    def install(name: str, pattern: tuple[int, int] | None) -> None:
        method = methods.load(name)
        quantize = method.__call__

        def prune(self: Any, layer: Layer, grid: Grid, dtype: torch.dtype) -> Layer:
            mask = largest(layer.W, *pattern) if pattern else layer.W.abs() > 0.02
            done = quantize(self, replace(layer, W=layer.W * mask), grid, dtype)
            assert done.Q is not None
            Q = replace(done.Q, mask=mask, pattern=pattern)
            return replace(done, W=layer.W, V=layer.W * mask, mask=mask, pattern=pattern, Q=Q)

        def encodes(self: Any, encoding: Encoding, shape: tuple[int, int]) -> Encoding:
            return replace(encoding, sparsity=Sparsity(*(pattern or (shape[0] * shape[1] // 3,))))

        monkeypatch.setattr(method, "__call__", prune)
        monkeypatch.setattr(method, "encodes", encodes, raising=False)

    return install


def tensor_bytes(folder: Path, layer: str) -> int:
    """What a layer takes in the checkpoint, its bias apart."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.startswith(layer + ".") and not n.endswith(".bias")]  # noqa: SIM118
        return sum(file.get_tensor(n).nbytes for n in names)


@pytest.mark.parametrize(
    ("family", "method", "pattern"),
    [("llama", "rtn", None), ("gpt2", "rtn", (2, 4)), ("mixtral", "rtn", (2, 4)), ("llama", "gptq", None)],
)
def test_config_report_and_bytes_say_what_was_stored(
    family: str,
    method: str,
    pattern: tuple[int, int] | None,
    pruning: Callable[..., None],
    built: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pruning(method, pattern)
    recipe = {"steps": [{"method": method}], "grid": "w4g32", "dtype": "keep", "calibration": SETTINGS}
    todo = plan(built(family), recipe, tmp_path / "out")
    assert todo.wire.format == "native"
    expected = {name: layer.bytes_after for name, layer in todo.layers.items()}
    results = {layer.name: layer for layer in compress(todo)}
    config = quantization_config(tmp_path / "out")
    model = hfquant.load(tmp_path / "out")
    assert config["version"] == 2
    facts = {fact.name: fact for fact in layers(tmp_path / "out", {})}
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/report.json").read_text("utf-8"))["layers"]}
    for name, result in results.items():
        fact = facts.get(name.removesuffix(".weight")) or facts[name]
        encoding = model.get_submodule(name.rpartition(".")[0]).encoding
        assert str(encoding) == result.encoding == rows[name]["encoding"]
        assert result.bytes_after == fact.bytes == rows[name]["bytes_after"]
        assert fact.pattern == ("2of4" if pattern else "any")
        if pattern:
            assert result.bytes_after == expected[name]
            assert fact.sparsity >= 0.5
        else:
            kept = encoding.sparsity.n
            assert 0 < kept < fact.shape[0] * fact.shape[1]
            assert result.bytes_after == tensor_bytes(tmp_path / "out", name.removesuffix(".weight"))
    if not pattern:
        assert len({result.encoding for result in results.values()}) > 5  # each layer kept another number
    assert torch.isfinite(logits(model)).all()
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "out"), stored(tmp_path / "again"))
    assert quantization_config(tmp_path / "again") == config


@pytest.mark.parametrize(
    ("family", "method", "pattern"), [("llama", "rtn", None), ("mixtral", "rtn", (2, 4)), ("gpt2", "gptq", None)]
)
def test_compressed_while_loaded(
    family: str,
    method: str,
    pattern: tuple[int, int] | None,
    pruning: Callable[..., None],
    built: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pruning(method, pattern)
    recipe = {"steps": [{"method": method}], "grid": "w4g32", "dtype": "keep", "calibration": SETTINGS}
    config = hfquant.HfQuantConfig(recipe, tokenizer=byte_tokenizer())
    model = load_with_transformers(family, built(family), quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    kept = [group.get("sparsity", {}).get("n") for group in quantization_config(tmp_path / "out")["groups"]]
    assert all(kept)
    again = hfquant.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_what_the_format_cannot_say_stops_before_it_is_lost(
    monkeypatch: pytest.MonkeyPatch, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a method foretells it of: before the work.  What it does not: no checkpoint that lacks it."""
    monkeypatch.setattr(methods.load("rtn"), "encodes", lambda self, e, shape: replace(e, rank=4), raising=False)
    recipe = {"steps": [{"method": "rtn"}], "grid": "w4g32sym", "format": "gptq"}
    with pytest.raises(FormatError, match=r"`gptq` cannot store .* stores weights and nothing else"):
        plan(built("llama"), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Q = encode(torch.randn(64, 64), Encoding.parse("w4g32sym-r4"))
    skeleton: Any = None
    with pytest.raises(FormatError, match=r"`gptq` cannot store a.weight as w4g32sym-r4"):
        named_parts(skeleton, formats.load("gptq"), "a.weight", "linear", Q)


def test_standard_formats_hold_the_zeros(
    pruning: Callable[..., None], built: Callable[[str], Path], tmp_path: Path
) -> None:
    pruning("rtn", (2, 4))
    recipe = {"steps": [{"method": "rtn"}], "grid": "w4g32sym", "format": "compressed_tensors"}
    results = list(compress(built("llama"), recipe, tmp_path / "out"))
    assert {result.encoding for result in results} == {"w4g32sym"}
    assert quantization_config(tmp_path / "out")["config_groups"]["group_0"]["targets"] == ["Linear"]
    facts = list(layers(tmp_path / "out", {}))
    assert all(fact.sparsity >= 0.5 and fact.pattern is None for fact in facts)

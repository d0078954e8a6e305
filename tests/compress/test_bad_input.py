"""Whatever would stop the work later stops it before it starts, with a way out, and leaves nothing behind."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hfquant.cli import app
from hfquant.compress import compress, plan
from hfquant.errors import (
    CalibrationError,
    CheckpointError,
    FormatError,
    HfquantError,
    RecipeError,
    ResourceError,
    SourceError,
)
from hfquant.model.headers import TensorInfo
from tests.model.gguf_files import FAMILIES, bpe_vocabulary, write_gguf

SMALL = {"samples": 4, "seq_len": 32}
WEIGHTS = "model.safetensors"
planning = sys.modules["hfquant.compress.plan"]


@pytest.fixture
def model(built: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small model of the test's own."""
    return Path(shutil.copytree(built("llama"), tmp_path / "model"))


def refused(
    model: Path | str, out: Path, kind: type[HfquantError], match: str, recipe: Any = "gptq-w4g32", **kw: Any
) -> None:
    before = out.exists()
    with pytest.raises(kind, match=match) as caught:
        plan(model, recipe, out, **SMALL | kw)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert out.exists() == before


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})


def read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a weight from here on fails."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(planning, "survey", read)
    monkeypatch.setattr(TensorInfo, "read", read)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)


def test_unknown_names(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path / "o", RecipeError, "unknown method `gptp`.*", "gptp-w4g32")
    refused(model, tmp_path / "o", RecipeError, "damping", {"steps": [{"method": "gptq", "damping": 1}], "grid": "w4"})


def test_group_and_format_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    recipe = {"steps": [{"method": "rtn"}], "grid": "w4g48", "format": "compressed_tensors"}
    refused(model, tmp_path / "o", FormatError, "group 48 does not divide 64", recipe)
    recipe = {"steps": [{"method": "rtn"}], "grid": "w5g32", "format": "gptq"}
    refused(model, tmp_path / "o", FormatError, "5 bit does not exist", recipe)


def test_already_quantized(model: Path, tmp_path: Path) -> None:
    list(compress(model, "rtn-w4g32", tmp_path / "done"))
    refused(tmp_path / "done", tmp_path / "o", SourceError, "already quantized .compressed-tensors.")


def test_missing_model(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "o", SourceError, "does not exist")
    refused("no-such-org/no-such-model", tmp_path / "o", SourceError, "Hub cannot be reached")
    refused("not a name!/x", tmp_path / "o", SourceError, "neither a folder nor a Hub id")


def test_only_pickled_weights(model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    refused(model, tmp_path / "o", SourceError, "pickled weights")


def test_no_weights(model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).unlink()
    refused(model, tmp_path / "o", SourceError, "no .*safetensors")


def test_remote_code(model: Path, tmp_path: Path) -> None:
    change_config(model, model_type="mymodel", auto_map={"AutoModelForCausalLM": "modeling_my.My"})
    refused(model, tmp_path / "o", SourceError, "its own modelling code")


def test_unknown_architecture(model: Path, tmp_path: Path) -> None:
    change_config(model, model_type="mymodel")
    refused(model, tmp_path / "o", SourceError, "transformers cannot read the config")


def test_damaged_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    refused(model, tmp_path / "o", SourceError, "is not JSON")


def test_missing_shard(model: Path, tmp_path: Path) -> None:
    names = load_file(model / WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, tmp_path / "o", SourceError, "lacks the shard model-00001-of-00001")


@pytest.mark.parametrize("keep", [4, 2000, -100])
def test_truncated_shard(model: Path, tmp_path: Path, keep: int) -> None:
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[:keep])
    refused(model, tmp_path / "o", SourceError, "truncated or damaged")


def test_config_that_lies_about_shapes(model: Path, tmp_path: Path) -> None:
    change_config(model, intermediate_size=96)
    refused(model, tmp_path / "o", SourceError, r"mlp\..*is \(.*96.*checkpoint holds")


def test_config_that_lies_about_depth(model: Path, tmp_path: Path) -> None:
    change_config(model, num_hidden_layers=5)
    refused(model, tmp_path / "o", SourceError, r"lacks .* weights, `model.layers.3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(name: str, value: float, model: Path, tmp_path: Path) -> None:
    change_weights(model, lambda t: t[name].view(-1).__setitem__(7, value))
    refused(model, tmp_path / "o", SourceError, f"`{name}` holds NaN or infinite")


def test_text_too_short(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time there was " * 5)
    refused(
        model,
        tmp_path / "o",
        CalibrationError,
        "4 sequences of 32|sequences of 32, not 64",
        calibration=str(tmp_path / "short.txt"),
        samples=64,
    )
    refused(model, tmp_path / "o", CalibrationError, "does not exist", calibration=str(tmp_path / "none.txt"))
    refused(model, tmp_path / "o", CalibrationError, "longer than the model's", seq_len=4096, samples=1)


@pytest.mark.parametrize("recipe", ["rtn-w8a8static", "smoothquant+rtn-w8a8static"])
def test_static_activations_without_text(
    recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scales are measured: whatever leaves nothing to measure them on is refused before a weight is read."""
    read_nothing(monkeypatch)
    (tmp_path / "empty.txt").write_text("")
    np.save(tmp_path / "empty.npy", np.zeros(0, dtype=np.int64))
    (tmp_path / "torn.npy").write_bytes(b"")
    out = tmp_path / "o"
    refused(model, out, RecipeError, "names no text", recipe, calibration="")
    refused(model, out, RecipeError, "`samples` of the calibration cannot be `0`", recipe, samples=0)
    refused(model, out, CalibrationError, "0 sequences of 32", recipe, calibration=str(tmp_path / "empty.txt"))
    refused(model, out, CalibrationError, "0 sequences of 32", recipe, calibration=str(tmp_path / "empty.npy"))
    refused(model, out, CalibrationError, "is not a `.npy` file", recipe, calibration=str(tmp_path / "torn.npy"))
    refused(model, out, CalibrationError, "does not exist", recipe, calibration=str(tmp_path / "none.npy"))
    words = ["compress", str(model), "-r", recipe, "-o", str(out), "--samples", "4", "--seq-len", "32", "--calibration"]
    for given, said in (("", "names no text"), (str(tmp_path / "empty.txt"), "0 sequences")):
        done = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [*words, given])
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.stderr.replace("\n", " ")
        assert "hint: " in done.stderr
    assert not out.exists()


def test_a_model_without_a_tokenizer_cannot_be_shown_text(model: Path, tmp_path: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    refused(model, tmp_path / "o", SourceError, "tokenizer", "rtn-w8a8static")


def test_tokenizer_of_another_model(model: Path, tmp_path: Path) -> None:
    change_config(model, vocab_size=100)
    change_weights(model, lambda t: [t.__setitem__(n, t[n][:100].clone()) for n in list(t) if t[n].shape[0] == 260])
    refused(model, tmp_path / "o", CalibrationError, "vocabulary ends at 100")


def test_folders_that_are_not_ours(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    refused(model, out, CheckpointError, "not empty and not hfquant's")
    refused(model, out, CheckpointError, "not empty and not hfquant's", fresh=True)
    assert (out / "thesis.doc").read_text() == "mine"
    refused(model, model / WEIGHTS, CheckpointError, "is a file")


def test_finished_folders_are_replaced_only_when_asked(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    list(compress(model, "rtn-w4g32", out))
    (out / "notes.txt").write_text("mine")
    refused(model, out, CheckpointError, "already holds a finished model")
    (out / "notes.txt").unlink()
    list(compress(model, "rtn-w8", out, fresh=True))
    assert json.loads((out / "report.json").read_text())["recipe"]["grid"]["bits"] == 8


def test_too_little_disk_and_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(model, tmp_path / "o", ResourceError, "are needed, 50 MB are allowed", max_memory=50_000_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(model, tmp_path / "o", ResourceError, "of disk are needed")


@pytest.mark.parametrize("source", ["default", "self"])
@pytest.mark.parametrize("lacking", ["memory", "the machine's memory", "disk"])
def test_what_cannot_fit_is_refused_before_a_weight_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, lacking: str
) -> None:
    read_nothing(monkeypatch)
    kw: dict[str, Any] = {"calibration": source}
    if lacking == "memory":
        kw["max_memory"] = 50_000_000
    elif lacking == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:
        monkeypatch.setattr(planning, "most_memory", lambda: 60_000_000)
    match = {"memory": "50 MB are allowed", "the machine's memory": "60 MB are allowed", "disk": "of disk are needed"}
    refused(model, tmp_path / "o", ResourceError, match[lacking], **kw)


def test_the_estimate_is_announced_before_a_weight_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan(model, "gptq-w4g32", tmp_path / "o", **SMALL)
    told: list[Any] = []
    read_nothing(monkeypatch)
    with pytest.raises(AssertionError, match="a weight was read"):
        plan(model, "gptq-w4g32", tmp_path / "o", **SMALL, announce=told.append)
    (foreseen,) = told
    about = {"seconds": None, "peak_memory": None}  # which depends on what the process holds
    assert replace(foreseen.estimate, **about) == replace(whole.estimate, **about)
    assert foreseen.estimate.seconds > 0
    assert (foreseen.batch, foreseen.room, foreseen.blocks) == (whole.batch, whole.room, whole.blocks)


def test_a_refused_run_takes_the_source_that_it_unpacked_with_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", FAMILIES["llama"], extra=bpe_vocabulary())
    refused(file, tmp_path / "o", ResourceError, "are needed, 50 MB are allowed", max_memory=50_000_000)
    plan(file, "gptq-w4g32", tmp_path / "o", **SMALL)
    refused(file, tmp_path / "o", ResourceError, "are needed, 50 MB are allowed", max_memory=50_000_000)
    assert (tmp_path / "o/.hfquant/source/config.json").is_file()  # which an earlier run had unpacked


def test_device_that_is_not_there(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path / "o", ResourceError, "unknown device", device="gpu")
    if not torch.cuda.is_available():
        refused(model, tmp_path / "o", ResourceError, "no CUDA device", device="cuda")


def test_model_without_blocks(model: Path, tmp_path: Path) -> None:
    change_config(model, num_hidden_layers=0)
    change_weights(model, lambda t: [t.pop(name) for name in list(t) if ".layers." in name])
    refused(model, tmp_path / "o", SourceError, "no stack of blocks")
    words = ["compress", str(model), "-r", "rtn-w4g32", "-o", str(tmp_path / "o")]
    done = CliRunner(env={"NO_COLOR": "1"}).invoke(app, words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "no stack of blocks" in done.stderr
    assert "\n\nhint: " in done.stderr

"""`inspect` and `generate` on checkpoints as they lie on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

import hfquant
from hfquant.measure.layers import zeros
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from tests import families
from tests.plugin.test_encodings import write

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A random model of a family, compressed with a recipe while it was loaded."""

    def make(family: str, recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("models")
        source = families.build(family, folder / "source")
        config = hfquant.HfQuantConfig(recipe)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        model.save_pretrained(folder / "small")
        families.byte_tokenizer().save_pretrained(folder / "small")
        return folder / "small"

    return make


@pytest.mark.parametrize(
    ("family", "recipe", "stored"),
    [("llama", "rtn-w4g32", "pack-quantized"), ("llama", "rtn-w3g48", "native"), ("mixtral", "rtn-w5g32", "native")],
    ids=["compressed-tensors", "ragged", "experts"],
)
def test_inspect(run: Run, checkpoint: Callable[[str, str], Path], family: str, recipe: str, stored: str) -> None:
    folder = checkpoint(family, recipe)
    names = families.linears(family)
    (folder / "report.json").write_text(json.dumps({"schema": 1, "layers": [{"name": min(names), "error": 0.0625}]}))
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert found["format"] == stored
    rows = {row["name"]: row for row in found["layers"]}
    assert set(rows) == names
    assert {row["bits"] for row in rows.values()} == {int(recipe[5])}
    assert rows[min(names)]["error"] == 0.0625
    assert all(0 < row["sparsity"] < 0.5 for row in rows.values())
    assert found["total"]["bytes"] == sum(row["bytes"] for row in rows.values())
    lines = run("inspect", folder).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(rows)
    assert "0.0625" in next(line for line in lines if min(names) in line)
    assert lines[-1].split()[:2] == [str(len(rows)), "layers"]


def test_inspect_says_what_is_stored_beside_the_weights(run: Run, tmp_path: Path) -> None:
    source = families.build("llama", tmp_path / "source")
    write("llama", tmp_path / "small", source, "native", ("w4g32sym-2of4-r4-a8token-s", "w16sym-kept1800"))
    head, *lines = (line.split() for line in run("inspect", tmp_path / "small").stdout.splitlines())
    assert head == ["layer", "shape", "bits", "group", "sparsity", "rank", "activations", "error", "size"]
    said = {line[0]: line for line in lines}
    first, second = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    assert "2of4" in said[first]
    assert "a8token" in said[first]
    assert "scaled" in said[first]
    assert said[second][4] == "16"
    rows = {row["name"]: row for row in json.loads(run("inspect", tmp_path / "small", "--json").stdout)["layers"]}
    assert [rows[first][key] for key in ("pattern", "rank", "activations")] == ["2of4", 4, "a8token scaled"]
    assert [rows[second][key] for key in ("pattern", "rank", "activations")] == ["any", 0, None]
    assert rows[first]["sparsity"] >= 0.5


def test_generate(run: Run, checkpoint: Callable[[str, str], Path]) -> None:
    folder = checkpoint("llama", "rtn-w4g32")
    done = run("generate", folder, "--prompt", "Once upon", "--max-new-tokens", "4")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("Once upon")
    assert len(done.stdout) > len("Once upon\n")
    assert run("generate", folder, "--prompt", "Once upon", "--max-new-tokens", "4").stdout == done.stdout


def test_generate_needs_a_tokenizer(run: Run, checkpoint: Callable[[str, str], Path]) -> None:
    folder = checkpoint("llama", "rtn-w4g32")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    done = run("generate", folder, "--prompt", "x")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: `{folder}` has no tokenizer")
    assert "hint: copy the original model's tokenizer files there" in done.stderr


def test_zeros_are_counted() -> None:
    codes = torch.tensor([[8, 8, 0, 15, 3, 8]], dtype=torch.uint8)
    zero = torch.tensor([[8, 3]], dtype=torch.uint8)
    assert zeros(Quantized(codes=codes, scale=torch.ones(1, 2), zero_point=zero, grid=Grid(4, 3))) == 0.5

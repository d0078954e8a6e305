"""`diagnose` as a whole: files, report, card, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hfquant.cli import app
from hfquant.compress import compress
from hfquant.conversion import hub as pushing
from hfquant.errors import CheckpointError
from hfquant.measure.diagnose import diagnose
from hfquant.measure.verify import verify
from tests.hub.server import Hub

SMALL = {"samples": 2, "seq_len": 32}
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def results(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two measured results of one model."""
    found = {}
    for recipe in ("rtn-w2g32", "rtn-w8"):
        found[recipe] = tmp_path_factory.mktemp("results") / recipe
        for _ in compress(built("llama"), recipe, found[recipe]):
            pass
        verify(found[recipe], windows=2, window_len=32, new_tokens=2, enforce=False)
    return found


@pytest.fixture
def folder(results: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(results["rtn-w2g32"], tmp_path / "small")
    return tmp_path / "small"


def test_figures_of_a_result_are_in_its_card_and_on_the_hub(hub: Hub, folder: Path, results: dict[str, Path]) -> None:
    words = ["diagnose", str(folder), "--beside", str(results["rtn-w8"]), "--samples", "2", "--seq-len", "32"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    figures = sorted(path.name for path in (folder / "figures").glob("*.png"))
    assert figures == sorted(
        ["frontier.png", "layer-error.png", "bits.png", "clipping.png", "embeddings.png", "channels.png", "tokens.png",
         "rows.png", "weights.png"]
    )  # fmt: skip
    data = json.loads((folder / "figures" / "diagnosis.json").read_text())
    assert [row["name"] for row in data["frontier"]] == ["original", "rtn-w2g32", "rtn-w8"]
    assert set(data["weights"]) == {"original", "compressed"}
    kinds = [(entry["kind"], entry["model"]) for entry in data["embeddings"]]
    told = [("embeddings", "original"), ("hidden", "original"), ("hidden", "compressed")]
    assert kinds == told, "the table did not change, and is told of once"
    card = (folder / "README.md").read_text()
    assert all(f"](figures/{name})" in card for name in figures)
    assert "How hard the original is to compress" in card
    pushing.push(folder, "alice/small", force=True)
    there = hub.store.repos["alice/small"].resolve("main").files
    assert {f"figures/{name}" for name in [*figures, "diagnosis.json"]} <= there.keys()
    again = pushing.push(folder, "alice/small", force=True)
    assert not again.changed


def test_a_new_measurement_keeps_the_figures(folder: Path) -> None:
    diagnose(folder, look=False)
    verify(folder, windows=1, window_len=32, new_tokens=2, enforce=False)
    assert "](figures/layer-error.png)" in (folder / "README.md").read_text()


def test_quick_looks_at_the_report_alone(folder: Path) -> None:
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    found = diagnose(folder, look=False)
    assert [figure["file"] for figure in found["figures"]] == ["layer-error.png", "bits.png"]
    assert len(found["layers"]) == 21
    assert all(2 < row["bits"] < 4 for row in found["layers"])
    diagnose(folder, folder.with_name("elsewhere"), look=False)
    assert len(list(folder.with_name("elsewhere").iterdir())) == 3, "two pictures and the data"


def test_a_dense_model(built: Built, tmp_path: Path) -> None:
    found = diagnose(built("gpt2"), tmp_path / "out", **SMALL)
    names = {figure["file"] for figure in found["figures"]}
    assert names == {"embeddings.png", "channels.png", "tokens.png", "rows.png", "weights.png"}
    assert all(figure["about"] == "model" for figure in found["figures"])
    with pytest.raises(CheckpointError, match="not the folder of a compressed model") as refused:
        diagnose(built("gpt2"), **SMALL)
    assert "--out" in str(refused.value.hint)


def test_results_that_cannot_be_compared_are_refused(folder: Path, results: dict[str, Path], tmp_path: Path) -> None:
    def changed(**evaluation: Any) -> Path:
        other = tmp_path / f"other-{len(evaluation)}-{evaluation.get('window')}"
        shutil.copytree(results["rtn-w8"], other)
        report = json.loads((other / "report.json").read_text())
        report["evaluation"] = {**report["evaluation"], **evaluation} if evaluation else None
        (other / "report.json").write_text(json.dumps(report))
        return other

    with pytest.raises(CheckpointError, match="they differ in number of windows and window length\n"):
        diagnose(folder, look=False, beside=[changed(window=64, windows=1)])
    with pytest.raises(CheckpointError, match="was not compared with its original"):
        diagnose(folder, look=False, beside=[changed()])

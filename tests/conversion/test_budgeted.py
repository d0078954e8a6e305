"""A conversion to a budget: the layers' grids are chosen on the way, and the promise is kept by what is measured."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfquant import report
from hfquant.conversion.tasks import do_compress, do_evaluate
from hfquant.recipe import Recipe

Folders = Callable[[str], Path]


def task(model: Path, out: Path, **budget: Any) -> dict[str, Any]:
    recipe = Recipe.parse({"name": "gptq", "budget": budget, "calibration": {"samples": 8, "seq_len": 64}})
    return {"source": str(model), "out": str(out), "model": "me/model", "revision": "main", "facts": {},
            "recipe": recipe.model_dump(mode="json"), "memory": 10**10, "text": None,
            "measuring": {"windows": 8, "window_len": 64, "new_tokens": 4}}  # fmt: skip


@pytest.mark.parametrize("budget", [{"fit": 150_000}, {"max_loss": 0.5}])
def test_it_is_chosen_compressed_and_measured(budget: dict[str, Any], trained: Folders, tmp_path: Path) -> None:
    wanted, events = task(trained("llama"), tmp_path / "out", **budget), list[dict[str, Any]]()
    assert do_compress(wanted, events.append, io.BytesIO()) == {"resumed": False}
    assert {event["event"] for event in events} == {"plan", "layer"}
    known = report.read(tmp_path / "out")
    assert known["budget"]["asked"].items() >= budget.items()
    assert Recipe.parse(known["recipe"]).budget is None
    measured = known["budget"]["measured"]
    assert measured["bytes"] <= budget.get("fit", 10**9)
    assert measured["perplexity_growth"] <= budget.get("max_loss", 10)
    done = do_evaluate(wanted, events.append, io.BytesIO())
    assert done["passed"]
    assert report.read(tmp_path / "out")["budget"]["measured"] == measured
    assert do_compress(wanted, events.append, io.BytesIO()) == {"resumed": True}


def test_one_that_died_before_it_was_measured_is_made_again(trained: Folders, tmp_path: Path) -> None:
    wanted = task(trained("llama"), tmp_path / "out", fit=150_000)
    do_compress(wanted, lambda event: None, io.BytesIO())
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    file = tmp_path / "out" / report.FILE
    known = report.read(tmp_path / "out")
    file.write_text(json.dumps({key: value for key, value in known.items() if key != "budget"}))
    assert do_compress(wanted, lambda event: None, io.BytesIO()) == {"resumed": False}
    assert "budget" in report.read(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first

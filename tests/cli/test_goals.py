"""`hfquant compress` with a goal: how it is read, what is told, and in which order things happen."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import Result

from hfquant.cli import engine_budget
from hfquant.recipe import Recipe

from .conftest import Engine

Run = Callable[..., Result]
COMMAND = ("compress", "org/model", "--out", "small")
TOLD = {
    "goal": "within 120 MB",
    "predicted": {"kl": 0.02, "perplexity_growth": 0.0202, "bytes": 119_900_000},
    "layers": [
        {
            "layer": "a.q", "grid": "w4g64sym", "bits": 4.25, "bytes": 2_390, "loss": 1.24e-3,
            "smaller": {"grid": "w3g64", "bytes": -500, "loss": 3.7e-3}, "larger": None,
        }
    ],
}  # fmt: skip
FACTS = {"goal": "within 120 MB", "chosen": "120 MB, 4.24 bits per weight in the blocks", "speed": None}


@pytest.fixture
def chosen(fake: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engine of goals: what it was asked, in order; it chooses gptq-w4g64."""
    asked: list[Any] = []

    def open_case(model: str, recipe: Recipe, out: Path, **settings: Any) -> SimpleNamespace:
        asked.append(("open", model, recipe.budget, settings))
        return SimpleNamespace(recipe=recipe, source=model, folder=out / ".hfquant" / "budget", out=out)

    def reach(case: Any, table: Any, compressed: Any, told: Any, say: Any) -> dict[str, Any]:
        told("decision")
        return dict(compressed(Recipe.parse("gptq-w4g64"), False))

    monkeypatch.setattr(engine_budget, "open_case", open_case)
    monkeypatch.setattr(engine_budget, "look", lambda case, told: asked.append("look"))
    monkeypatch.setattr(engine_budget, "decide", lambda case, table: "decision")
    monkeypatch.setattr(engine_budget, "predicted", lambda decision: FACTS)
    monkeypatch.setattr(engine_budget, "explain", lambda decision, folder: TOLD)
    monkeypatch.setattr(engine_budget, "reach", reach)
    return asked


def test_checks_then_looks_then_compresses(run: Run, fake: Engine, chosen: list[Any]) -> None:
    done = run(*COMMAND, "--fit", "120MB", "--samples", "8", "--set", "gptq.damp=0.05")
    assert done.exit_code == 0
    assert [one if one == "look" else one[0] for one in chosen] == ["open", "look"]
    _, model, budget, settings = chosen[0]
    assert (model, budget.fit, settings["samples"]) == ("org/model", 120_000_000, 8)
    assert [name for name, *_ in fake.asked] == ["plan", "verify"]
    assert "goal    within 120 MB" in done.stderr
    assert "speed" not in done.stderr.split("recipe ")[0]
    assert "perplexity       29.45 -> 32.31" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--average-bits", "3.5"], {"average_bits": 3.5}),
        (["--max-loss", "1%"], {"max_loss": 0.01}),
        (["--fastest", "--within", "4GB", "--max-loss", "0.02"],
         {"fastest": True, "within": 4_000_000_000, "max_loss": 0.02}),
    ],
)  # fmt: skip
def test_goals_are_read(run: Run, chosen: list[Any], words: list[str], said: dict[str, Any]) -> None:
    assert run(*COMMAND, *words).exit_code == 0
    assert {key: getattr(chosen[0][2], key) for key in said} == said


def test_a_dry_run_explains_and_stops(run: Run, fake: Engine, chosen: list[Any]) -> None:
    done = run(*COMMAND, "--fit", "120MB", "--dry-run")
    assert (done.exit_code, fake.asked) == (0, [])
    assert done.stdout.splitlines()[1].split() == [
        "a.q",
        "w4g64sym",
        "4.25",
        "2.39",
        "kB",
        "1.24e-03",
        "w3g64",
        "+3.7e-03",
    ]
    assert "the same command without --dry-run goes on from here" in " ".join(done.stderr.split())
    assert json.loads(run(*COMMAND, "--fit", "120MB", "--dry-run", "--json").stdout) == TOLD


def test_the_recipes_own_budget_is_one(run: Run, chosen: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("budget: {fit: 50MB, bits: [3, 4]}\n")
    run(*COMMAND, "--recipe", tmp_path / "mine.yaml")
    assert (chosen[0][2].fit, chosen[0][2].bits) == (50_000_000, (3, 4))


MISTAKES = [
    ([], "neither a recipe nor a goal is given"),
    (["--fit", "120MB", "--average-bits", "3"], "`fit` and `average_bits` are two goals"),
    (["--within", "4GB"], "it names no goal"),
    (["--fit", "1GB", "--within", "4GB"], "`within` is for `fastest`"),
    (["--average-bits", "0"], "should be greater than 0"),
    (["--recipe", "gptq-w4g64", "--dry-run"], "`--dry-run` says what a goal leads to, and there is none"),
    (
        ["--recipe", "sparsegpt-2of4", "--fit", "1GB"],
        "a budget chooses what becomes of every layer; step `sparsegpt` says",
    ),
    (["--fit", "1GB", "--set", "format=gptq"], "format `gptq` cannot mix grids in one checkpoint"),
    (["--fit", "much"], "cannot read `much` as a size"),
    (["--max-loss", "much"], "cannot read `much` as a share"),
]


@pytest.mark.parametrize(("words", "text"), MISTAKES, ids=[text[:24] for _, text in MISTAKES])
def test_mistakes(run: Run, fake: Engine, chosen: list[Any], words: list[str], text: str) -> None:
    done = run(*COMMAND, *words)
    assert (done.exit_code, done.stdout, chosen, fake.asked) == (2, "", [], [])
    assert text in " ".join(done.stderr.replace("│", " ").split())

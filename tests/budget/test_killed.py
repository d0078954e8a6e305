"""A budgeted compression that is killed goes on: with the same choices, to the same bytes."""

import os
import signal
from pathlib import Path

import pytest

from hfquant import compress, plan
from hfquant.budget import decide, open_case, promise, table_of
from hfquant.budget.promise import reach
from hfquant.recipe import Recipe
from hfquant.report import merge, read
from tests.compress.folders import digests
from tests.processes import forked

from .making import SMALL, Folders

MOMENTS = {"looking": (1, 0), "first attempt": (0, 9), "second attempt": (0, 30), "its end": (0, 42)}


def budgeted(model: Path, out: Path, blocks: int = 0, layers: int = 0) -> None:
    """What `hfquant compress --max-loss 10%` does, where the first result loses too much.

    blocks, layers: after so many that were looked at, or compressed in all attempts together, it is killed.
    """
    done = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def looked(block: int, _: int) -> None:
        if block == blocks:
            die()

    def made(recipe: Recipe, again: bool) -> None:
        nonlocal done
        for _ in compress(plan(model, recipe, out, **SMALL, fresh=again)):
            done += 1
            if done == layers:
                die()
        grown = 0.12 if recipe == first else 0.09
        merge(
            out,
            evaluation={"perplexity": 10 * (1 + grown), "reference_perplexity": 10.0, "growth_error": 0.0, "kl": 0.1},
        )

    case = open_case(model, {"name": "gptq", "budget": {"max_loss": 0.1}}, out, **SMALL)
    table = table_of(case, looked)
    first = decide(table, case.recipe).recipe
    reach(case, table, made)


def test_an_attempt_for_another_text_or_a_fresh_start_begins_anew(trained: Folders, tmp_path: Path) -> None:
    """A bound that held on one text says nothing of another."""
    (tmp_path / "mine.txt").write_text("The lion walked down the yellow road. " * 50)
    recipe, out = {"name": "gptq", "budget": {"max_loss": 0.1}}, tmp_path / "out"
    case = open_case(trained("llama"), recipe, out, **SMALL)
    attempt = promise.Attempt(number=3, bound=0.02, held=0.02)
    case.folder.mkdir(parents=True)
    promise._remember(case, case.table, attempt)
    for settings, found in (
        ({}, attempt),
        ({"text": tmp_path / "mine.txt"}, promise.Attempt()),
        ({"fresh": True}, promise.Attempt()),
    ):
        assert promise._resumed(open_case(trained("llama"), recipe, out, **SMALL, **settings)) == found


def kept(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(out).items() if name != "README.md"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_changes_no_byte(moment: str, trained: Folders, tmp_path: Path) -> None:
    calm, out = tmp_path / "calm", tmp_path / "out"
    budgeted(trained("llama"), calm)
    assert read(calm)["budget"]["attempts"] == 2
    code, _ = forked(lambda: budgeted(trained("llama"), out, *MOMENTS[moment]))
    assert code == -signal.SIGKILL
    budgeted(trained("llama"), out)
    assert kept(out) == kept(calm)
    assert not (out / ".hfquant").exists()

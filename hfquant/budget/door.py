"""A model and a recipe with a budget -> the recipe without."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compress.journal import Journal
from ..compress.layout import Layout, lay_out
from ..compress.plan import check_device, check_out, check_room, generated_tokens, read_tokens, with_calibration
from ..errors import CalibrationError, HfquantError, RecipeError
from ..measure.text import PACKAGED, read_text
from ..model.calibration import digest
from ..model.source import Source, open_source
from ..model.survey import survey
from ..recipe import GridSpec, Recipe
from .analysis import SCRATCH, Told, analyse, room
from .candidates import Bytes, candidates
from .decide import Decision, check, decide
from .table import Row, Table

FOLDER, TABLE = "budget", "table.json"  # in the working folder of a compression
VERSION = 6  # of how losses are predicted


@dataclass(frozen=True)
class Case:
    """A model that is laid out for a recipe with a budget.

    table: without losses.  text: what promises are measured on, by its SHA-256.  fresh: whether earlier attempts count.
    """

    source: Source
    recipe: Recipe
    laid: Layout
    tokens: Tensor
    out: Path
    folder: Path
    table: Table
    device: str
    fingerprint: str
    text: str
    fresh: bool


def open_case(
    model: "str | Path | Source",
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    out: str | Path,
    *,
    calibration: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    fresh: bool = False,
    device: str = "cpu",
    text: str | Path | None = None,
) -> Case:
    """Check everything that can be checked before any work.  Arguments as those of `compress.plan`, and the text that
    the result will be measured on, as in `measure.verify`.

    Raises an HfquantError for what would stop the work later, a budget that cannot be met among it.
    """
    chosen = with_calibration(Recipe.parse(recipe), source=calibration, samples=samples, seq_len=seq_len, seed=seed)
    budget = chosen.budget
    if budget is None:
        raise RecipeError(f"recipe `{chosen.name}` has no budget", "give it one: `budget: {fit: 2.5GB}`")
    out, journal = Path(out).expanduser(), Journal(Path(out).expanduser())
    check_device(device)
    check_out(out, journal, fresh)
    with journal.untouched():
        source = model if isinstance(model, Source) else open_source(model, staging=journal.source)
        laid = lay_out(source, outlined(chosen), device)
        table = outline(laid, chosen)
        check(table, budget)
        _check_text(source, chosen)
        folder, c = journal.folder / FOLDER, chosen.calibration
        needed = room(laid, chosen, c.samples, c.seq_len)
        if not (folder / TABLE).is_file():
            check_room(out, needed - _left(folder))
        measured = read_text(PACKAGED if text is None else text)
        tokens = read_tokens(source, chosen)
        if tokens is None:
            tokens = generated_tokens(source, chosen, laid.skeleton.model)
        fingerprint = _fingerprint(survey(source, laid.dtype), tokens, chosen, device)
        if (folder / TABLE).is_file() and Table.read(folder / TABLE, fingerprint) is None:
            check_room(out, needed - _left(folder))
    return Case(source, chosen, laid, tokens, out, folder, table, device, fingerprint, measured.sha256, fresh)


def _fingerprint(identity: Any, tokens: Tensor, recipe: Recipe, device: str) -> str:
    """Of all that a table depends on."""
    budget = recipe.budget
    assert budget is not None
    key = [VERSION, identity, digest(tokens), recipe.model_copy(update={"budget": None}).hash, device]
    key += [torch.__version__, budget.bits, budget.groups, budget.sparsity, budget.ranks, budget.with_ends]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _left(folder: Path) -> int:
    """Bytes that a killed analysis has left, and that the next one deletes."""
    return sum(file.stat().st_size for file in folder.glob(f"{SCRATCH}*/**/*") if file.is_file())


def outlined(recipe: Recipe) -> Recipe:
    """A recipe whose targets are all that its budget chooses for."""
    assert recipe.budget is not None
    ends = recipe.embeddings
    if recipe.budget.with_ends and ends is None:
        ends = GridSpec(bits=8, group_size=64)
    return recipe.model_copy(update={"embeddings": ends, "format": "native", "budget": None})


def outline(laid: Layout, recipe: Recipe) -> Table:
    """The table without losses: from headers alone."""
    assert recipe.budget is not None
    sizes, rows = Bytes(laid, recipe), []
    for target in laid.targets.values():
        options = [sizes.option(target, one) for one in candidates(target, recipe, recipe.budget)]
        count = laid.skeleton.model.get_parameter(target.parameter).numel()
        rows.append(Row(target.layer, target.kind, count, target.layer, tuple(options)))
    return Table(tuple(rows), sizes.rest(), sizes.original())


def _check_text(source: Source, recipe: Recipe) -> None:
    """Raises CalibrationError where there is no text to measure a loss on."""
    if recipe.budget is None or recipe.budget.allowed is None:
        return
    try:
        source.tokenizer()
    except HfquantError as error:
        raise CalibrationError(
            f"a loss is measured on a text, and {source.id} has no tokenizer to read one with: {error.message}",
            "put the tokenizer's files into the model's folder, or give a size: `--fit`",
        ) from None


def table_of(case: Case, told: Told | None = None) -> Table:
    """The table with losses; what an interrupted or a dry run has found is used again."""
    assert case.recipe.budget is not None
    kept = case.folder / TABLE
    table = Table.read(kept, case.fingerprint)
    if table is None:
        case.folder.mkdir(parents=True, exist_ok=True)
        for stale in case.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(stale)
        table = analyse(case.laid, case.recipe, case.tokens, case.folder, case.device, told)
        table = replace(table, about={**table.about, "fingerprint": case.fingerprint})
        table.write(kept)
    if case.recipe.budget.fastest and table.rows[0].options[0].seconds is None:
        from .speed import timed

        table = timed(table, case.source.config, case.laid.dtype)
        table.write(kept)
    return table


def remember(case: Case, table: Table) -> None:
    """The table as a file, where a result that was finished before has removed it."""
    if not (case.folder / TABLE).is_file():
        table.write(case.folder / TABLE)


def choose_recipe(
    model: "str | Path | Source", recipe: "str | Path | Mapping[str, Any] | Recipe", out: str | Path, **settings: Any
) -> Decision:
    """The decision for a model: `open_case`, `table_of` and `decide` in one."""
    case = open_case(model, recipe, out, **settings)
    return decide(table_of(case), case.recipe)

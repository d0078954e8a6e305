"""From a table and a goal to a recipe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import methods
from ..errors import RecipeError
from ..methods._streams import Observed
from ..recipe import GridSpec, Recipe
from ..recipe_budget import Budget, Share
from ..sizes import size
from .candidates import ENDS
from .choose import frontier, solve, total, units
from .table import Option, Row, Table


@dataclass(frozen=True)
class Decision:
    """recipe: an ordinary one.  chosen: what becomes of every weight.  nbytes: of the weight files, at least what
    they will have.  loss: predicted KL, nats per token.  seconds: that the weights take for
    a token, 0 where speed was not the goal.  frontier, uniform: (bytes, loss) of the best choices for other
    sizes, and of one grid everywhere, by its name."""

    recipe: Recipe
    budget: Budget
    chosen: tuple[tuple[Row, Option], ...]
    nbytes: int
    loss: float
    seconds: float
    table: Table
    frontier: tuple[tuple[int, float], ...] = ()
    uniform: tuple[tuple[str, int, float], ...] = field(default=())

    @property
    def bits(self) -> float:
        """Stored bits per weight inside the blocks."""
        inside = [(row, option) for row, option in self.chosen if row.kind not in ENDS]
        return 8 * sum(option.data for _, option in inside) / max(1, sum(row.weights for row, _ in inside))


def growth(kl: float) -> float:
    """By what share a KL divergence makes perplexity grow."""
    return math.expm1(min(kl, 50.0))


def check(table: Table, budget: Budget) -> None:
    """Raises RecipeError for a goal that no choice can reach, or that asks for nothing.  Losses do not matter."""
    least = sum(min(o.nbytes for o in row.options) for row in table.rows) + table.rest
    for name in ("fit", "within"):
        room = getattr(budget, name)
        if room is None:
            continue
        if room < least:
            raise RecipeError(
                f"{name} {size(room)} cannot be met: the smallest that these bits and groups give is {size(least)}",
                f"give at least {least:,} bytes, or allow fewer `budget.bits`, larger `budget.groups`",
            )
        if room >= table.original:
            raise RecipeError(
                f"{name} {size(room)} asks for nothing: uncompressed the model takes {size(table.original)}",
                "give less than that",
            )
    if budget.average_bits is not None:
        _check_average(table, budget, budget.average_bits)


def averaged(table: Table, budget: Budget) -> tuple[int, int]:
    """(weights that an average of bits counts, bytes of those that are not counted): embeddings and head count where
    they are chosen for."""
    ends = [] if budget.with_ends else [row for row in table.rows if row.kind in ENDS]
    weights = sum(row.weights for row in table.rows) - sum(row.weights for row in ends)
    return weights, sum(max(option.data for option in row.options) for row in ends)


def _check_average(table: Table, budget: Budget, wanted: float) -> None:
    weights, rest = averaged(table, budget)
    least, most = (
        8 * (sum(pick(o.data for o in row.options) for row in table.rows) - rest) / weights for pick in (min, max)
    )
    if wanted < least:
        raise RecipeError(
            f"{wanted:g} bits per weight cannot be met: the fewest that these bits and groups give are {least:.3f}",
            f"give at least {math.ceil(least * 1000) / 1000:g}: scales count too",
        )
    if wanted >= most:
        raise RecipeError(
            f"{wanted:g} bits per weight ask for nothing: as they are, weights take {most:.3g}", "give less than that"
        )


def decide(table: Table, recipe: Recipe, bound: float | None = None) -> Decision:
    """The best choice for a recipe's budget.  bound: KL at most, in place of what `max_loss` says.

    Raises RecipeError where there is none.
    """
    budget = recipe.budget
    assert budget is not None
    some = units(table.rows, budget.together)
    limits: dict[str, float] = {}
    if (room := budget.fit or budget.within) is not None:
        limits["nbytes"] = room - table.rest
    if budget.average_bits is not None:
        counted, rest = averaged(table, budget)
        limits["data"] = budget.average_bits * counted / 8 + rest
    if budget.allowed is not None:
        limits["loss"] = math.log1p(budget.allowed) if bound is None else bound
    least = "seconds" if budget.fastest else "nbytes" if budget.max_loss else "loss"
    picked = solve(some, least, limits)
    pairs = (zip(unit.rows, unit.options[i], strict=True) for unit, i in zip(some, picked, strict=True))
    chosen = [pair for unit in pairs for pair in unit]
    order = {row.layer: i for i, row in enumerate(table.rows)}
    chosen.sort(key=lambda pair: order[pair[0].layer])
    return Decision(
        recipe=as_recipe(recipe, chosen),
        budget=budget,
        chosen=tuple(chosen),
        nbytes=table.rest + int(total(some, picked, "nbytes")),
        loss=total(some, picked, "loss"),
        seconds=total(some, picked, "seconds"),
        table=table,
        frontier=tuple((table.rest + nbytes, loss) for nbytes, loss in frontier(some)),
        uniform=tuple(_uniform(table)),
    )


def _uniform(table: Table) -> "list[tuple[str, int, float]]":
    """One grid for all weights in blocks that have a choice, the rest as it is."""
    inside = [row for row in table.rows if row.kind not in ENDS and len(row.options) > 1]
    others = [row.options[-1] for row in table.rows if row.kind in ENDS or len(row.options) == 1]
    rest, lost = table.rest + sum(option.nbytes for option in others), sum(option.loss for option in others)
    found = []
    for name in dict.fromkeys(option.name for row in inside for option in row.options if option.grid is not None):
        options = [next((o for o in row.options if o.name == name), None) for row in inside]
        if all(options):
            real = [option for option in options if option is not None]
            found.append((name, rest + sum(o.nbytes for o in real), lost + sum(o.loss for o in real)))
    return found


def as_recipe(recipe: Recipe, chosen: "Sequence[tuple[Row, Option]]") -> Recipe:
    """The recipe without a budget that says what was chosen, layer by layer."""
    counts: dict[GridSpec, int] = {}
    for row, option in chosen:
        if option.grid is not None and row.kind not in ENDS:
            counts[option.grid] = counts.get(option.grid, 0) + row.weights
    if not counts:
        raise _nothing(recipe)
    common = max(counts, key=lambda grid: (counts[grid], grid.bits))
    data: dict[str, Any] = recipe.model_dump(mode="json")
    own = {
        row.layer: None if option.grid is None else option.grid.model_dump()
        for row, option in chosen
        if option.grid != common or row.kind in ENDS
    }
    data |= {
        "name": f"{recipe.name} {said(recipe.budget)}" if recipe.budget else recipe.name,
        "budget": None,
        "steps": _steps(recipe, chosen),
        "grid": common.model_dump(),
        "overrides": own | {glob: grid for glob, grid in data["overrides"].items() if glob not in own},
        "embeddings": None,
        "format": "native",
    }
    return Recipe.parse(data)


def _steps(recipe: Recipe, chosen: "Sequence[tuple[Row, Option]]") -> list[dict[str, Any]]:
    """The recipe's steps, and those that only some layers go through."""
    shares: dict[Share, list[str]] = {}
    ranks: dict[int, list[str]] = {}
    for row, option in chosen:
        if option.sparsity is not None:
            shares.setdefault(option.sparsity, []).append(row.layer)
        if option.rank:
            ranks.setdefault(option.rank, []).append(row.layer)
    kinds = [methods.kind(step.method) for step in recipe.steps]
    at = kinds.index("quantize")
    watched = {key: value for key, value in recipe.steps[at].options.items() if key in Observed.model_fields}
    pruning = [
        {
            "method": "sparsegpt",
            "pattern" if isinstance(share, str) else "sparsity": share,
            **watched,
            "only": _once(some),
        }
        for share, some in shares.items()
    ]
    correcting = [{"method": "lorc", "rank": rank, "only": _once(some)} for rank, some in sorted(ranks.items())]
    steps = [step.model_dump(mode="json") for step in recipe.steps]
    return [*steps[:at], *pruning, steps[at], *correcting, *steps[at + 1 :]]


def _once(layers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(layers))


def _nothing(recipe: Recipe) -> RecipeError:
    if recipe.budget is not None and recipe.budget.fastest and recipe.budget.within is None:
        return RecipeError(
            "on this machine no layer is faster compressed than as it is", "give a size: `--within`, or `--fit`"
        )
    return RecipeError(
        "within this loss no layer can be compressed", "allow more loss, or add wider grids to `budget.bits`"
    )


def said(budget: Budget) -> str:
    """The goal in words."""
    if budget.fit is not None:
        return f"within {size(budget.fit)}"
    if budget.average_bits is not None:
        return f"at {budget.average_bits:g} bits"
    if budget.fastest:
        within = f" within {size(budget.within)}" if budget.within else ""
        return f"as fast as possible{within}"
    return f"at most {budget.max_loss:.3g} worse"

"""Options of `hfquant compress` that name a goal instead of a recipe."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError
from . import engine_budget
from .arguments import size as read_size
from .output import log, print_facts, print_json, print_table
from .progress import looking
from .units import size

if TYPE_CHECKING:
    from ..budget import Case, Decision, Table
    from ..recipe import Recipe


def _share(text: str) -> float:
    from ..recipe_budget import read_share

    try:
        return read_share(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Fit = Annotated[
    int | None,
    typer.Option(
        parser=read_size, metavar="SIZE", help="Choose every layer's bits so that the weights take `2.5GB` on disk."
    ),
]
AverageBits = Annotated[
    float | None,
    typer.Option(metavar="BITS", help="Choose them so that a weight takes `3.5` bits on average, scales included."),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(parser=_share, metavar="SHARE", help="Choose the smallest whose perplexity grows by at most `1%`."),
]
Fastest = Annotated[
    bool,
    typer.Option(
        "--fastest", help="Choose what takes this machine the least time for a token; loses 5%, or `--max-loss`."
    ),
]
Within = Annotated[
    int | None, typer.Option(parser=read_size, metavar="SIZE", help="With --fastest: weights of at most `4GB` on disk.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With a goal: say what would be chosen, and stop.")]


def with_goal(recipe: str | None, changes: list[str] | None, **goal: Any) -> "Recipe":
    """The recipe, with the goal as its budget if there is one.  Raises RecipeError where neither is given."""
    from .. import recipe_budget
    from ..recipe import Recipe

    given = {key: value for key, value in goal.items() if value is not None and value is not False}
    if recipe is None and not given:
        raise RecipeError(
            "neither a recipe nor a goal is given",
            "give `--recipe gptq-w4g128`, or a goal: `--fit 2.5GB`, `--average-bits 3.5`, `--max-loss 1%`",
        )
    if recipe is None:
        return Recipe.parse({"name": "gptq", "budget": given}, changes or [])
    chosen = Recipe.parse(recipe, changes or [])
    return Recipe.parse(recipe_budget.with_goal(chosen.model_dump(mode="json"), given)) if given else chosen


def show(case: "Case", as_json: bool) -> None:
    """`--dry-run`: look at the model, say what would be chosen and why, leave recipe and figure beside it."""
    decision = engine_budget.decide(case, _looked(case))
    _tell(decision)
    told = engine_budget.explain(decision, case.folder)
    print_json(told) if as_json else _table(told)
    log().print(f"recipe and figure are in `{case.folder}`; the same command without --dry-run goes on from here")


def reach(case: "Case", compressed: "Callable[[Recipe, bool], dict[str, Any]]") -> dict[str, Any]:
    """Choose, compress, measure, if need be again.  compressed(recipe, again): does it.  Returns the report."""
    return engine_budget.reach(case, _looked(case), compressed, told=_tell, say=log().print)


def _looked(case: "Case") -> "Table":
    with looking(log()) as told:
        return engine_budget.look(case, told)


def _tell(decision: "Decision") -> None:
    print_facts(log(), engine_budget.predicted(decision))


def _table(told: Mapping[str, Any]) -> None:
    """Layer by layer on stdout: what it got, what that costs, and what the nearest other grids would."""
    columns = ["layer", "grid", "bits", "size", "loss", "smaller", "costs", "larger", "gains"]
    lines = []
    for row in told["layers"]:
        down, up = row["smaller"], row["larger"]
        lines.append(
            [
                row["layer"], row["grid"], f"{row['bits']:.2f}", size(row["bytes"]), f"{row['loss']:.2e}",
                *([down["grid"], f"{down['loss']:+.1e}"] if down else ["", ""]),
                *([up["grid"], f"{up['loss']:+.1e}"] if up else ["", ""]),
            ]
        )  # fmt: skip
    print_table(columns, lines, right=["bits", "size", "loss", "costs", "gains"])

"""Choose, compress, measure; where more is lost than was allowed, choose again with less."""

from collections.abc import Callable
from typing import Any

from ..errors import QualityError
from ..recipe import Recipe
from .decide import Decision, decide
from .door import Case, remember, resumed_bound
from .explain import into_report
from .table import Table

ATTEMPTS = 4
TIGHTER = 0.9  # of the bound that the last attempt suggests

Compressed = Callable[[Recipe, bool], Any]  # (recipe, whether it takes the place of an earlier result)


def reach(
    case: Case, table: Table, compressed: Compressed, *, told: Callable[[Decision], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report of a result that keeps the recipe's budget, `max_loss` by what was measured.

    table: from `table_of`.  compressed: makes and measures `case.out`.  told: of every decision, before it is carried
    out.  say: of what is done again, and why.
    Raises QualityError if after `ATTEMPTS` it still loses more; the last result is kept.
    """
    assert case.recipe.budget is not None
    allowed, bound = case.recipe.budget.max_loss, resumed_bound(case)
    for attempt in range(1, ATTEMPTS + 1):
        decision = decide(table, case.recipe, bound)
        if told is not None:
            told(decision)
        remember(case, table, bound)
        compressed(decision.recipe, attempt > 1)
        report = into_report(decision, case.out, attempt)
        lost = report["budget"]["measured"]["perplexity_growth"]
        if allowed is None or lost is None or lost <= allowed:
            return report
        said = f"perplexity grew by {lost:.2%}, more than the {allowed:.2%} that are allowed"
        bound = decision.loss * TIGHTER * allowed / lost
        if attempt < ATTEMPTS and say is not None:
            say(f"{said}: once more with less, {attempt + 1} of at most {ATTEMPTS} times")
    raise QualityError(f"{said}, {ATTEMPTS} times", "allow more with `--max-loss`; the last result is kept as it is")

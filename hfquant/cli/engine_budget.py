"""The calls of `hfquant compress` into `hfquant.budget`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import engine
from .units import size

if TYPE_CHECKING:
    from ..budget import Case, Decision, Table
    from ..recipe import Recipe


def open_case(model: str, recipe: "Recipe", out: Path, **settings: Any) -> "Case":
    """Everything checked, nothing done."""
    engine.quiet()
    from ..budget import open_case

    return open_case(model, recipe, out, **settings)


def look(case: "Case", told: Callable[[int, int], None]) -> "Table":
    """What every layer costs on every grid."""
    from ..budget import table_of

    return table_of(case, told)


def decide(case: "Case", table: "Table") -> "Decision":
    """Choose."""
    from ..budget import decide

    return decide(table, case.recipe)


def explain(decision: "Decision", folder: Path) -> dict[str, Any]:
    """Recipe and figure of a decision into a folder; what there is to tell of it."""
    from ..budget.explain import write

    return write(decision, folder)


def predicted(decision: "Decision") -> dict[str, str | None]:
    """A few facts."""
    from ..budget.decide import growth, said

    return {
        "goal": said(decision.budget),
        "chosen": f"{size(decision.nbytes)}, {decision.bits:.2f} bits per weight in the blocks",
        "speed": f"{1000 * decision.seconds:.3g} ms for a token's products on this machine"
        if decision.seconds
        else None,
        "predicted": f"perplexity x {1 + growth(decision.loss):.3f}, KL {decision.loss:.3g} nats per token",
    }


def reach(case: "Case", table: "Table", compressed: Any, **tell: Callable[[Any], None]) -> dict[str, Any]:
    """Choose, compress and measure until what is lost is what was allowed; the report."""
    from ..budget.promise import reach

    return reach(case, table, compressed, **tell)

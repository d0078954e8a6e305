"""Choose, compress, measure; where more is lost than was allowed, choose again with less, where much less, with more.

Losses are predicted on calibration text, and measured on another.  What a first result loses tells how far the two are
apart for this model: the next bound is the last one times what is allowed over what was lost.  A bound is raised once
at most, and only where that saves bytes; if the larger bound does not hold, the one that held is made again.

A promise is for text that was not measured.  So what counts as lost is not what perplexity grew by on some tokens, but
the upper end of the one-sided 95% confidence interval for its mean over text of their kind: a small text allows less.
That all attempts are judged by one text, and the last of them chosen by it, is not counted for.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..compress.journal import Journal
from ..errors import QualityError
from ..recipe import Recipe
from ..tensors.shards import write_text
from .decide import Decision, decide, growth
from .door import Case, remember
from .explain import into_report
from .table import Table

ATTEMPTS = 4
TIGHTER = 0.9  # of the bound that the last attempt suggests
SLACK = 0.7  # of what is allowed: who loses less may lose more
MOST = 3.0  # times as large a bound, at most, after one measurement
WORTH = 0.01  # of the bytes, for which a model is compressed once more

RULE = 2  # of what counts as lost: an attempt that was judged by another is not gone on with

Compressed = Callable[[Recipe, bool], Any]  # (recipe, whether it takes the place of an earlier result)


@dataclass(frozen=True)
class Attempt:
    """number: from 1.  bound: KL at most, as predicted; None: what is allowed.  held: a bound whose result lost no more
    than was allowed, if one is known."""

    number: int = 1
    bound: float | None = None
    held: float | None = None


def reach(
    case: Case, table: Table, compressed: Compressed, *, told: Callable[[Decision], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report of a result that keeps the recipe's budget, its loss by what was measured.

    table: from `table_of`.  compressed: makes and measures `case.out`.  told: of every decision, before it is carried
    out.  say: of what is done again, and why.
    Raises QualityError if after `ATTEMPTS` it still loses more, or if there is too little text to tell; the last result
    is kept.
    """
    assert case.recipe.budget is not None
    allowed, attempt = case.recipe.budget.allowed, _resumed(case)
    begun = Journal(case.out).plan() is not None  # what an interrupted run has begun is gone on with
    while True:
        decision = decide(table, case.recipe, attempt.bound)
        if told is not None:
            told(decision)
        _remember(case, table, attempt)
        compressed(decision.recipe, attempt.number > 1 and not begun)
        begun = False
        report = into_report(decision, case.out, attempt.number)
        if allowed is None:
            return report
        lost, grew = _lost(report["budget"]["measured"])
        said = f"{grew}; {allowed:.2%} are allowed"
        if lost <= allowed:
            looser = _looser(case, table, decision, attempt, report["budget"]["measured"], lost)
            if looser is None:
                return report
            attempt, said = looser, f"{said}: once more with more"
        else:
            if attempt.number == ATTEMPTS:
                raise QualityError(
                    f"{said}; tried {ATTEMPTS} times",
                    "allow more with `--max-loss`, or measure on more `--text`; the last result is kept as it is",
                )
            attempt, said = _tighter(decision, attempt, lost, allowed), f"{said}: once more with less"
        if say is not None:
            say(f"{said}, {attempt.number} of at most {ATTEMPTS} times")


def _lost(measured: dict[str, Any]) -> tuple[float, str]:
    """What counts, and what is said of it.  Raises QualityError where there is too little text to tell."""
    grew, lost = measured["perplexity_growth"], measured["perplexity_growth_at_most"]
    if grew is None:
        return math.inf, "perplexity is not a number"
    if lost is None:
        raise QualityError(
            f"perplexity grew by {grew:.2%} on so little text that nothing can be promised for more",
            "measure on more: a larger `--text`, more `--windows`; the result is kept as it is",
        )
    return lost, f"perplexity grew by {grew:.2%}, less than {lost:.2%} with 95% confidence"


def _tighter(decision: Decision, attempt: Attempt, lost: float, allowed: float) -> Attempt:
    if attempt.held is not None:
        return Attempt(attempt.number + 1, attempt.held, attempt.held)
    share = allowed / lost if math.isfinite(lost) else 0.5
    return Attempt(attempt.number + 1, decision.loss * TIGHTER * share)


def _looser(
    case: Case, table: Table, decision: Decision, attempt: Attempt, measured: dict[str, Any], lost: float
) -> Attempt | None:
    """The attempt with a larger bound, if the first one left room and it is worth it."""
    assert case.recipe.budget is not None
    # by the divergence too, if that says more: on a text that is not the model's own, perplexity may stay by chance
    allowed, lost = case.recipe.budget.max_loss, max(lost, growth(measured["kl"] or 0.0))
    if allowed is None or attempt.number > 1 or lost > SLACK * allowed:
        return None
    bound = decision.loss * min(MOST, TIGHTER * allowed / max(lost, 1e-9))
    if decide(table, case.recipe, bound).nbytes > (1 - WORTH) * decision.nbytes:
        return None
    return Attempt(attempt.number + 1, bound, math.log1p(allowed))  # what the first one was bound by


def _remember(case: Case, table: Table, attempt: Attempt) -> None:
    """What is being tried: a run that takes up an interrupted one must make the same choice."""
    remember(case, table)
    write_text(case.folder / "attempt.json", json.dumps({"asked": _asked(case), **asdict(attempt)}))


def _resumed(case: Case) -> Attempt:
    file = case.folder / "attempt.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() and not case.fresh else {}
    return Attempt(**known) if known.pop("asked", None) == _asked(case) else Attempt()


def _asked(case: Case) -> str:
    assert case.recipe.budget is not None
    return f"{RULE} {case.fingerprint} {case.text} {case.recipe.budget.model_dump_json()}"

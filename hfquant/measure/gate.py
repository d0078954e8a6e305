"""The gate: whether what was measured is good enough to be used."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import QualityError
from ..recipe_parts import Gate

__all__ = ["Gate", "broken", "gate"]


def broken(report: Mapping[str, Any], limits: Gate) -> list[str]:
    """Every limit that a report does not keep, in words and numbers; empty if all are kept.

    A limit on what was not measured, or did not come out as a number, is broken: NaN passes nothing.
    """
    scores = report.get("evaluation") or {}
    original = _number(scores.get("reference_perplexity"))
    ratio = _number(scores.get("perplexity")) / original if original else math.nan
    found: list[str] = []
    if limits.max_ppl_ratio is not None and not ratio <= limits.max_ppl_ratio:
        before, after = _show(original), _show(_number(scores.get("perplexity")))
        found.append(
            f"perplexity is {_show(ratio)} times the original's ({before} -> {after}),"
            f" at most {limits.max_ppl_ratio:g} times is allowed"
        )
    kl = _number(scores.get("kl"))
    if limits.max_kl is not None and not kl <= limits.max_kl:
        found.append(f"KL divergence is {_show(kl)} nats per token, at most {limits.max_kl:g} is allowed")
    top1 = _number(scores.get("top1_agreement"))
    if limits.min_top1_agreement is not None and not top1 >= limits.min_top1_agreement:
        found.append(f"top-1 agreement is {_show(top1)}, at least {limits.min_top1_agreement:g} is needed")
    return found


def verdict(report: Mapping[str, Any], limits: Gate) -> dict[str, Any]:
    """The report's `gate` section."""
    failures = broken(report, limits)
    return {"passed": not failures, "limits": limits.model_dump(mode="json"), "broken": failures}


def gate(report: Mapping[str, Any], limits: Gate) -> None:
    """Raise QualityError, with every broken limit and its numbers, if a report is not good enough."""
    if failures := broken(report, limits):
        raise QualityError(
            "the compressed model was written, but its quality is below the gate:\n"
            + "\n".join(f"- {failure}" for failure in failures),
            "use more bits, smaller groups or a calibrated method; to accept this quality, relax the recipe's"
            " `gate` (`--set gate.max_ppl_ratio=null` switches the limit on perplexity off)",
        )


def _number(value: Any) -> float:
    """NaN for what was not measured, or was not finite (null in a report)."""
    return float(value) if isinstance(value, int | float) else math.nan


def _show(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not measured or not a number"

"""What each step of a recipe cost, or won back: the errors of the layers after it, from a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class StepError:
    """steps: up to and with the one in question, as a recipe's name has them.  layers: how many went this way.

    error: the mean of their relative output errors after it, None where none is known.
    """

    steps: str
    layers: int
    error: float | None


def step_errors(report: Mapping[str, Any]) -> list[StepError]:
    """One entry per step and way through the recipe, none if no layer took more than one step.

    Layers may go different ways: fused experts leave steps out, embeddings are only rounded.
    """
    ways: dict[tuple[str, ...], list[list[Any]]] = {}
    for row in report.get("layers") or ():
        trail = row.get("trail") or ()
        if len(trail) > 1:
            ways.setdefault(tuple(str(method) for method, _ in trail), []).append([error for _, error in trail])
    found = []
    for methods, errors in ways.items():
        for i in range(len(methods)):
            known = [row[i] for row in errors if row[i] is not None]
            found.append(StepError(" + ".join(methods[: i + 1]), len(errors), fmean(known) if known else None))
    return found

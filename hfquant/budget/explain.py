"""Why a decision is what it is: its figure, its table, and its section of the report."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import report
from ..measure import card
from ..measure.figures.style import INKS, MARKERS, Drawing, logarithmic, page
from ..sizes import size
from ..tensors.shards import write_text
from .decide import Decision, growth, said
from .table import Option

RECIPE, FIGURE = "recipe.yaml", "figures/budget.png"
SHOWN = 12  # uniform recipes in a figure
SURE = 1.645  # standard errors, which a normal variable exceeds in one of 20 cases


def rows(decision: Decision) -> list[dict[str, Any]]:
    """Layer by layer: what it got, and what the next smaller and the next larger grid would have changed.

    loss: predicted KL in nats per token.  saves, costs: bytes less for so much more of it; gains, takes: so much less
    of it for bytes more.
    """
    found = []
    for row, option in decision.chosen:
        smaller = [o for o in row.options if o.nbytes < option.nbytes and o.loss > option.loss]
        larger = [o for o in row.options if o.nbytes > option.nbytes and o.loss < option.loss]
        down = min(smaller, key=lambda o: (o.loss - option.loss) / (option.nbytes - o.nbytes), default=None)
        up = max(larger, key=lambda o: (option.loss - o.loss) / (o.nbytes - option.nbytes), default=None)
        found.append(
            {
                "layer": row.layer, "kind": row.kind, "grid": option.name, "bits": 8 * option.data / row.weights,
                "bytes": option.nbytes, "loss": option.loss,
                "smaller": _step(option, down), "larger": _step(option, up),
            }
        )  # fmt: skip
    return found


def _step(option: Option, other: Option | None) -> dict[str, Any] | None:
    if other is None:
        return None
    return {"grid": other.name, "bytes": other.nbytes - option.nbytes, "loss": other.loss - option.loss}


def section(decision: Decision, attempts: int = 1) -> dict[str, Any]:
    """The report's `budget`."""
    return {
        "goal": said(decision.budget),
        "asked": decision.budget.model_dump(mode="json", exclude_none=True),
        "predicted": {
            "kl": decision.loss,
            "perplexity_growth": growth(decision.loss),
            "bytes": decision.nbytes,
            "seconds_per_token": decision.seconds or None,
        },
        "measured": None,
        "attempts": attempts,
        "bits_per_weight": decision.bits,
        "original_bytes": decision.table.original,
        "analysis": {key: value for key, value in decision.table.about.items() if key != "fingerprint"},
        "layers": rows(decision),
        "frontier": [list(point) for point in _thinned(decision.frontier)],
        "uniform": [list(point) for point in decision.uniform],
        "figure": None,
    }


def _thinned(points: "tuple[tuple[int, float], ...]", most: int = 200) -> "list[tuple[int, float]]":
    step = max(1, len(points) // most)
    return [*points[:-1:step], points[-1]]


def draw(told: Mapping[str, Any]) -> Drawing:
    """Size against predicted loss: the best choices, the one that was made, and one grid everywhere.  told: a section
    of the report."""
    chosen, title = told["predicted"], "Size and predicted loss"
    line = [(nbytes, loss) for nbytes, loss in told["frontier"] if loss > 0]
    uniform = _beside(told)
    with page(title, 4.4) as figure:
        axis = figure.subplots()
        axis.plot(
            [nbytes / 1e6 for nbytes, _ in line], [loss for _, loss in line], color="#888888", linestyle="--",
            linewidth=1, label="best choices for every size",
        )  # fmt: skip
        for i, (name, nbytes, loss) in enumerate(uniform):
            style = i % len(MARKERS)
            axis.plot(
                nbytes / 1e6, loss, marker=MARKERS[style], color=INKS[style], linestyle="none", markersize=6,
                markerfacecolor="white", label=f"{name} everywhere: {size(nbytes)}, {loss:.3g}",
            )  # fmt: skip
        axis.plot(
            chosen["bytes"] / 1e6, chosen["kl"], marker="*", color="black", linestyle="none", markersize=13,
            label=f"chosen: {size(chosen['bytes'])}, {chosen['kl']:.3g}",
        )  # fmt: skip
        axis.set_xlabel("weights on disk, MB")
        axis.set_ylabel("predicted KL, nats per token")
        logarithmic(axis)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    alt = (
        f"Size and predicted KL divergence. Chosen: {size(chosen['bytes'])}, {chosen['kl']:.3g} nats per token."
        f" One grid everywhere: {'; '.join(f'{name} {size(nbytes)}, {loss:.3g}' for name, nbytes, loss in uniform)}."
    )
    return Drawing(figure, title, alt)


def _beside(told: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Of the uniform recipes, those nearest to the choice in size."""
    near = sorted(told["uniform"], key=lambda point: abs(point[1] - told["predicted"]["bytes"]))[:SHOWN]
    return sorted(((name, nbytes, loss) for name, nbytes, loss in near if loss > 0), key=lambda point: point[1])


def write(decision: Decision, folder: Path, attempts: int = 1) -> dict[str, Any]:
    """Recipe and figure into a folder; the section that tells of them."""
    told = section(decision, attempts)
    drawing = draw(told)
    (folder / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    drawing.save(folder / FIGURE)
    write_text(folder / RECIPE, decision.recipe.to_yaml())
    told["figure"] = {"file": FIGURE, "title": drawing.title, "alt": drawing.alt, "about": "result"}
    return told


def into_report(decision: Decision, out: Path, attempts: int = 1) -> dict[str, Any]:
    """Beside a measured result: the recipe that it was made with, the figure, the report's section and the card's.

    Returns the report.
    """
    told, known = write(decision, out, attempts), report.read(out)
    found, output = known.get("evaluation") or {}, known.get("output") or {}
    told["measured"] = {
        "kl": found.get("kl"),
        **_grown(found),
        "bytes": output.get("bytes"),
    }
    files = sorted({*output.get("files", ()), RECIPE, FIGURE})
    done = report.merge(out, budget=told, output={**output, "files": files})
    card.write(out, done)
    return done


def _grown(found: Mapping[str, Any]) -> dict[str, float | None]:
    """By what share perplexity grew, and the upper end of the one-sided 95% confidence interval for its mean over text
    of this kind.  None for what was not measured, or is not a number; for the latter too where there was too little
    text to tell."""
    ppl, before, error = (found.get(key) for key in ("perplexity", "reference_perplexity", "growth_error"))
    if not ppl or not before:
        return {"perplexity_growth": None, "perplexity_growth_at_most": None}
    at_most = None if error is None else ppl / before * math.exp(SURE * error) - 1
    return {"perplexity_growth": ppl / before - 1, "perplexity_growth_at_most": at_most}

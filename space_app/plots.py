"""The two plots of the second tab.

Each stands in a column of its own and is hidden with that, by the style of the page: gradio's plots cannot be hidden
alone, their script trips when they are taken off the page, and takes all for names where it was shown an empty table
first.  What gradio calls `visible="hidden"` hides no column.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import pandas as pd

from hfquant.conversion.job import Job
from space_app import views

LAYER = ["layer", "error", "name"]
RESULT = ["megabytes", "perplexity ratio", "recipe"]
HIDDEN = "away"  # the class of what is not shown


def errors(parts: dict[str, Any]) -> None:
    """How far each layer is from the original, as they are finished."""
    with _place("errors", parts):
        parts["errors"] = gr.ScatterPlot(x="layer", y="error", height=240,
                                         x_axis_format="d", y_lim=[0, None],
                                         title="Relative output error of each layer",
                                         tooltip=["name", "error"])  # fmt: skip


def compared(parts: dict[str, Any]) -> None:
    """What was made so far: how small, and at what cost."""
    with _place("compared", parts):
        parts["compared"] = gr.ScatterPlot(x="megabytes", y="perplexity ratio",
                                           color="recipe", height=260, tooltip="all",
                                           title="Size and perplexity of all results")  # fmt: skip


def of_layers(layers: Mapping[str, float]) -> dict[str, Any]:
    """Name of a layer -> its relative output error, in the order of the model."""
    rows = [(n, error, name) for n, (name, error) in enumerate(layers.items(), 1)]
    top = 1.1 * max(layers.values(), default=0.0)  # no point is cut by the edge
    return _filled("errors", pd.DataFrame(rows, columns=LAYER), least=1, y_lim=[0, top], x_lim=[0, len(rows) + 1])


def of_results(found: Sequence[Job], reports: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """All that passed its gate; one result alone is not compared."""
    rows = []
    for job in found:
        if job.state == "failed":
            continue
        evaluation, output = ((reports.get(job.id) or {}).get(name) or {} for name in ("evaluation", "output"))
        before, after, size = evaluation.get("reference_perplexity"), evaluation.get("perplexity"), output.get("bytes")
        if before and after and size:
            rows.append([size / 1e6, after / before, views.recipe(job)])
    points = pd.DataFrame(rows, columns=RESULT)
    return _filled("compared", points, least=2, x_lim=around(points[RESULT[0]]), y_lim=around(points[RESULT[1]]))


def around(values: Sequence[float]) -> list[float]:
    """A range in which no point is cut by the edge, however close they lie together."""
    least, most = min(values, default=0.0), max(values, default=0.0)
    room = max(0.1 * (most - least), 0.02 * abs(most))
    return [least - room, most + room]


def none() -> dict[str, Any]:
    return {f"{name}_place": gr.update(elem_classes=[HIDDEN]) for name in ("errors", "compared")}


def _place(name: str, parts: dict[str, Any]) -> gr.Column:
    parts[f"{name}_place"] = gr.Column(elem_classes=[HIDDEN], elem_id=name)
    return parts[f"{name}_place"]


def _filled(name: str, points: pd.DataFrame, least: int, **more: Any) -> dict[str, Any]:
    if len(points) < least:
        return {f"{name}_place": gr.update(elem_classes=[HIDDEN])}
    return {f"{name}_place": gr.update(elem_classes=[]), name: gr.update(value=points, **more)}

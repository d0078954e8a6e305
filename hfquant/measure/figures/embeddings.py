"""The figure of embeddings: where they lie in a plane, and how alike they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from .style import INKS, MARKERS, Drawing, grid, page


def embeddings(data: Mapping[str, Any]) -> Drawing | None:
    """Token embeddings and the states before the head, of each model that has its own."""
    seen: Sequence[Mapping[str, Any]] = data.get("embeddings") or ()
    if not seen:
        return None
    kinds = list(dict.fromkeys(entry["kind"] for entry in seen))
    models = list(dict.fromkeys(entry["model"] for entry in seen))
    title = "How far apart embeddings are" if len(models) == 1 else "Embeddings before and after"
    # a row for each kind: before and after lie beside each other
    columns = kinds if len(models) == 1 else models
    places = [(kind, model) for kind in kinds for model in models]
    between = " " if len(columns) < 3 else "\n"  # three beside each other have no room for one line
    with page(title, 0.6 + 3.1 * len(places) / len(columns)) as figure:
        every = dict(zip(places, grid(figure, len(places), len(columns)), strict=True))
        ordered = [entry for place in places for entry in seen if (entry["kind"], entry["model"]) == place]
        axes = [every[entry["kind"], entry["model"]] for entry in ordered]
        for axis in set(every.values()) - set(axes):
            axis.text(
                0.5,
                0.5,
                "less than 1% apart\nin the compressed model",
                transform=axis.transAxes,
                ha="center",
                va="center",
            )
            axis.set_axis_off()
        for axis, entry in zip(axes, ordered, strict=True):
            style = models.index(entry["model"])
            x, y = zip(*entry["points"], strict=True)
            axis.scatter(x, y, s=11, marker=MARKERS[style], facecolors="none", edgecolors=INKS[style], linewidths=0.7)
            name = "" if len(models) == 1 else f"{entry['model']}:{between}"
            axis.set_title(f"{name}{entry['what']}\nmean cosine of pairs {entry['cosine']:.3f}")
            axis.tick_params(labelbottom=False, labelleft=False, length=0)
        _same_scale(axes, [entry["kind"] for entry in ordered], ordered)
    said = "; ".join(f"{entry['what']}, {entry['model']}: {entry['cosine']:.3f}" for entry in ordered)
    alt = (
        f"Scatter plots of up to {max(len(e['points']) for e in ordered)} embeddings each, projected onto the plane in"
        f" which those of the first model are spread the most. Mean cosine of pairs, 0 where they point in all"
        f" directions, 1 where they have become one: {said}."
    )
    return Drawing(figure, title, alt)


def _same_scale(axes: Sequence[Any], kinds: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Before and after have the same axes: what was pulled together looks it."""
    for kind in set(kinds):
        points = [point for entry in entries if entry["kind"] == kind for point in entry["points"]]
        for axis, own in zip(axes, kinds, strict=True):
            if own == kind:
                for place, limit in ((0, axis.set_xlim), (1, axis.set_ylim)):
                    low, high = min(p[place] for p in points), max(p[place] for p in points)
                    limit(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))

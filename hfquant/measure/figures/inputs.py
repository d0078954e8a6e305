"""Figures of what layers read: ranges that differ from token to token, channels that outgrow all others."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from .series import Row, Series, by_role, first_panels
from .style import DASHES, INKS, MARKERS, Drawing, band, below, depth, grid, height, legend, logarithmic, page, said


def _inputs(data: Mapping[str, Any]) -> dict[str, Series]:
    """model -> title -> rows"""
    seen: Mapping[str, Any] = data.get("inputs") or {}
    return {model: by_role(rows, lambda row: list(row["roles"])) for model, rows in seen.items() if rows}


def tokens(data: Mapping[str, Any]) -> Drawing | None:
    """The range of every token, max|x|, by block: of the original, or the only model there is."""
    seen = _inputs(data)
    if not seen:
        return None
    series, left_out = first_panels(next(iter(seen.values())))
    title = "Ranges of tokens at the inputs of layers"
    with page(title, height(len(series))) as figure:
        for axis, (name, rows) in zip(grid(figure, len(series)), series.items(), strict=True):
            _band(axis, rows)
            axis.set_title(f"into {name}")
        below(figure.axes[: len(series)], "block")
        figure.supylabel("largest |x| of a token", fontsize=10)
        legend(figure, figure.axes[0])
    worst = max((row for rows in series.values() for row in rows), key=_token_ratio)
    alt = (
        f"Largest magnitude of every token at the inputs of {len(series)} kinds of layers{left_out}, by block:"
        f" smallest, median and largest token, and the band of the middle 90 percent. At the worst place, block"
        f" {worst['block']}, tokens reach from {said(worst['tokens']['min'])} to {said(worst['tokens']['max'])}, a"
        f" factor of {said(_token_ratio(worst))}."
    )
    return Drawing(figure, title, alt)


def _token_ratio(row: Row) -> float:
    return float(row["tokens"]["max"] / max(row["tokens"]["min"], 1e-9))


def _band(axis: Axes, rows: list[Row]) -> None:
    blocks = [row["block"] for row in rows]
    of = {name: [max(row["tokens"][name], 1e-6) for row in rows] for name in rows[0]["tokens"]}
    band(axis, blocks, of["p5"], of["p95"], "90% of tokens")
    lines = (
        ("max", "^", "-", "largest token"), ("median", "o", "-", "median"), ("min", "v", "--", "smallest token"),
    )  # fmt: skip
    for ink, (name, marker, dash, label) in zip((INKS[1], INKS[0], INKS[4]), lines, strict=True):
        axis.plot(blocks, of[name], marker=marker, linestyle=dash, color=ink, label=label, markersize=3.5)
    logarithmic(axis)
    depth(axis, blocks)


def channels(data: Mapping[str, Any]) -> Drawing | None:
    """The largest channel over the median one, by block: as it is, after smoothing, in the compressed model."""
    seen = _inputs(data)
    if not seen:
        return None
    series, left_out = first_panels(next(iter(seen.values())))
    compressed = seen.get("compressed") if len(seen) > 1 else None
    title = "Largest channels at the inputs of layers"
    with page(title, height(len(series))) as figure:
        for axis, (name, rows) in zip(grid(figure, len(series)), series.items(), strict=True):
            _ratios(axis, rows, 0, "channel_ratio", "original" if compressed else "as it is")
            _ratios(axis, rows, 1, "channel_ratio_smoothed", "smoothed, α = 0.5")
            if compressed and name in compressed:
                _ratios(axis, compressed[name], 2, "channel_ratio", "compressed")
            logarithmic(axis)
            axis.set_title(f"into {name}")
        below(figure.axes[: len(series)], "block")
        figure.supylabel("largest channel / median channel", fontsize=10)
        legend(figure, figure.axes[0])
    every = [row for rows in series.values() for row in rows]
    worst = max(every, key=lambda row: float(row["channel_ratio"]))
    smoothed = max(float(row["channel_ratio_smoothed"]) for row in every)
    alt = (
        f"How many times the largest channel exceeds the median one at the inputs of {len(series)} kinds of"
        f" layers{left_out}, by block, before and after smoothing. Before: up to {said(worst['channel_ratio'])} times,"
        f" in block {worst['block']}. After smoothing with alpha 0.5: up to {said(smoothed)} times."
    )
    return Drawing(figure, title, alt)


def _ratios(axis: Axes, rows: list[Row], style: int, key: str, label: str) -> None:
    blocks = [row["block"] for row in rows]
    axis.plot(
        blocks,
        [row[key] for row in rows],
        marker=MARKERS[style],
        linestyle=DASHES[style],
        color=INKS[style],
        label=label,
        markerfacecolor="white" if style else INKS[0],
        markersize=3.5,
    )
    depth(axis, blocks)

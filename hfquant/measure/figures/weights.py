"""Figures of weights: rows of one matrix with very different ranges, and distributions that are not normal."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ..diagnose.statistics import BINS, SIGMAS
from .series import Row, Series, by_role, first_panels
from .style import DASHES, INKS, Drawing, band, below, depth, grid, height, legend, logarithmic, page

FEW = 3 / 16  # of the range of a matrix: with one scale of 4 bit for all of it, such a row keeps three values


def rows(data: Mapping[str, Any]) -> Drawing | None:
    """The ranges of the rows of each block's attention output, over that of the whole matrix."""
    seen = [row for row in _original(data.get("weights") or {}) if row["attention_output"]]
    if not seen:
        return None
    series, left_out = first_panels(by_role(seen, lambda row: [str(row["role"])]))
    title = "Ranges of the rows of one matrix"
    with page(title, 0.6 + height(len(series), 1, 2.3)) as figure:
        for axis, (name, listed) in zip(grid(figure, len(series), 1), series.items(), strict=True):
            _rows(axis, listed)
            axis.set_title(f"attention output ({name})")
            axis.set_ylabel("range of a row /\nrange of the matrix")
        legend(figure, figure.axes[0])
        below(figure.axes, "block", 1)
    worst = min((row for listed in series.values() for row in listed), key=_least)
    poor = sum(row["rows"]["median"] / row["rows"]["max"] < FEW for row in seen)
    alt = (
        f"Range of the rows of the attention output, relative to the whole matrix, by block{left_out}: smallest, median"
        f" and largest row. In block {worst['block']} the smallest row has {_least(worst):.2g} of the range of the"
        f" matrix: one 4-bit scale for all of it would leave that row {_values(_least(worst))} of 16 values. At"
        f" most 3 values would be left to half of the rows in {poor} of {len(seen)} blocks."
    )
    return Drawing(figure, title, alt)


def _least(row: Row) -> float:
    return float(row["rows"]["min"] / max(row["rows"]["max"], 1e-30))


def _values(share: float) -> int:
    """Of the 16 values of a 4-bit grid, those within this share of its range."""
    return max(1, round(16 * share))


def _rows(axis: Axes, listed: list[Row]) -> None:
    blocks = [row["block"] for row in listed]
    of = {name: [row["rows"][name] / max(row["rows"]["max"], 1e-30) for row in listed] for name in listed[0]["rows"]}
    band(axis, blocks, of["p5"], of["p95"], "90% of rows")
    axis.plot(blocks, of["median"], marker="o", color=INKS[0], label="median row")
    axis.plot(blocks, of["min"], marker="v", linestyle="--", color=INKS[4], label="smallest row")
    axis.axhline(FEW, color=INKS[1], linestyle=":", linewidth=1.6, label="3 values left at 4 bit")
    axis.set_ylim(min(0.5 * FEW, 0.8 * min(of["min"])), 1.1)
    logarithmic(axis)
    depth(axis, blocks)


def distributions(data: Mapping[str, Any]) -> Drawing | None:
    """How weights are distributed, by kind of layer, in standard deviations of their matrix."""
    seen: Mapping[str, Any] = data.get("histograms") or {}
    kinds = {model: _panels(rows) for model, rows in seen.items()}
    first = next(iter(kinds.values()), {})
    if not first:
        return None
    series, left_out = first_panels(first)
    facts = by_role(_original(data["weights"]), lambda row: [str(row["role"])])
    title = "Distribution of weights by kind of layer"
    with page(title, height(len(series), each=1.7)) as figure:
        axes = grid(figure, len(series), sharex=True, sharey=True)
        for axis, name in zip(axes, series, strict=True):
            for style, (model, panels) in enumerate(kinds.items()):
                if name in panels:
                    _histogram(axis, panels[name][0]["counts"], style, model)
            axis.plot(*_normal(), color="#999999", linewidth=1, linestyle=":", label="normal")
            largest = max(float(row["largest"]) for row in facts[name])
            heavy = max(float(row["kurtosis"]) for row in facts[name])
            axis.set_title(name)
            axis.text(
                0.98, 0.95, f"max {largest:.0f} σ\nkurtosis {heavy:.1f}", transform=axis.transAxes, ha="right",
                va="top", fontsize=9,
            )  # fmt: skip
        legend(figure, axes[0])
        below(axes, "weight / std of its matrix")
        figure.supylabel("share of weights (log)", fontsize=10)
    outlying = max((row for name in series for row in facts[name]), key=lambda row: float(row["largest"]))
    alt = (
        f"Distribution of the weights of {len(series)} kinds of layers{left_out}, in standard deviations of their"
        f" matrix, beside a normal distribution. The largest weight lies {outlying['largest']:.3g} standard deviations"
        f" out, in block {outlying['block']}; kurtosis reaches"
        f" {max(float(r['kurtosis']) for n in series for r in facts[n]):.3g}, where a normal distribution has 3."
    )
    return Drawing(figure, title, alt)


def _original(models: Mapping[str, Sequence[Row]]) -> Sequence[Row]:
    return next(iter(models.values()), [])


def _panels(rows_: Sequence[Row]) -> Series:
    return by_role([{"block": 0, **row} for row in rows_], lambda row: [str(row["role"])])


def _histogram(axis: Axes, counts: Sequence[float], style: int, label: str) -> None:
    total, width = sum(counts), 2 * SIGMAS / BINS
    edges = [-SIGMAS + i * width for i in range(BINS + 1)]
    shares = [max(count / total, 1e-12) for count in counts]
    axis.stairs(shares, edges, color=INKS[style], linestyle=DASHES[style], linewidth=1.3, label=label)
    axis.set_yscale("log")
    axis.set_ylim(1e-8, 1)
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value < 1 else "1")
    )


def _normal() -> tuple[list[float], list[float]]:
    """The shares that bins of a normal distribution hold."""
    import math

    width = 2 * SIGMAS / BINS
    x = [-SIGMAS + (i + 0.5) * width for i in range(BINS)]
    return x, [max(width * math.exp(-v * v / 2) / math.sqrt(2 * math.pi), 1e-12) for v in x]

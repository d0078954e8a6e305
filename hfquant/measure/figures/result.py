"""Figures of a result: errors along the depth, bits and bytes, and several results by size and accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...sizes import size
from ..diagnose.result import best
from .series import Row, by_role
from .style import DASHES, HATCHES, INKS, MARKERS, Drawing, depth, legend, logarithmic, page, shorten


def _in_blocks(data: Mapping[str, Any]) -> list[Row]:
    return [row for row in data.get("layers") or () if row["block"] is not None]


def errors(data: Mapping[str, Any]) -> Drawing | None:
    """The relative output error of every layer."""
    rows = [row for row in _in_blocks(data) if row["error"]]
    if not rows:
        return None
    series = by_role(rows, lambda row: [str(row["role"])])
    title = "Error of each layer's output"
    with page(title, 4.0) as figure:
        axis = figure.subplots()
        for i, (name, listed) in enumerate(series.items()):
            style = i % len(MARKERS)
            axis.plot(
                [row["block"] for row in listed], [row["error"] for row in listed], label=name, marker=MARKERS[style],
                linestyle=DASHES[i % len(DASHES)], color=INKS[style], linewidth=1,
            )  # fmt: skip
        logarithmic(axis)
        depth(axis, [row["block"] for row in rows])
        axis.set_xlabel("block")
        axis.set_ylabel("error of the output / the output")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    worst = max(rows, key=lambda row: float(row["error"]))
    mean = sum(float(row["error"]) for row in rows) / len(rows)
    alt = (
        f"Relative error of the output of {len(rows)} compressed layers by block, one line per kind of layer. Mean"
        f" {mean:.3g}; the largest is {worst['error']:.3g}, in block {worst['block']}."
    )
    return Drawing(figure, title, alt)


def bits(data: Mapping[str, Any]) -> Drawing | None:
    """Bits per weight along the depth, and where the bytes are."""
    rows = _in_blocks(data)
    if not rows:
        return None
    series = by_role(rows, lambda row: [str(row["role"])])
    blocks = sorted({(row["stack"], row["block"]) for row in rows})
    at = {place: i for i, place in enumerate(blocks)}
    unit, step = ("MB", 1e6) if sum(row["bytes_after"] for row in rows) >= 1e5 * len(blocks) else ("kB", 1e3)
    title = "Bits and bytes of each layer"
    with page(title, 5.0) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.5))
        total = [0.0] * len(blocks)
        before = [0.0] * len(blocks)
        alike = len({(row["stack"], row["block"], round(row["bits"], 2)) for row in rows}) == len(blocks)
        for i, (name, listed) in enumerate(series.items()):
            style, places = i % len(MARKERS), [at[row["stack"], row["block"]] for row in listed]
            # lines of equal bits lie on each other: each a little beside the last, unless all are equal
            shift = 0.0 if len(series) == 1 or alike else (i / (len(series) - 1) - 0.5) * 0.6
            top.plot(
                [place + shift for place in places], [row["bits"] for row in listed], linestyle="none",
                marker="o" if alike else MARKERS[style], color="#333333" if alike else INKS[style], markersize=3.5,
            )  # fmt: skip
            stored = [row["bytes_after"] / step for row in listed]
            bottom.bar(
                places, stored, bottom=[total[p] for p in places], label=name, hatch=HATCHES[style], width=0.85,
                facecolor="white", edgecolor=INKS[style], linewidth=0.6,
            )  # fmt: skip
            for place, row, part in zip(places, listed, stored, strict=True):
                total[place] += part
                before[place] += row["bytes_before"]
        mean = size(sum(before) / len(before))
        bottom.set_title(f"the original has {mean} in each block", loc="right", fontsize=9)
        top.set_ylabel("bits per weight")
        top.set_ylim(0, max(row["bits"] for row in rows) * 1.15)
        bottom.set_ylabel(unit)
        bottom.set_xlabel("block")
        depth(bottom, range(len(blocks)))
        legend(figure, bottom)
    files = data.get("stored") or {}
    beside = files["after"] - sum(row["bytes_after"] for row in rows) if files.get("after") else None
    rest = "" if beside is None else f" {size(beside)} more are not in these layers."
    every = [float(row["bits"]) for row in rows]
    low, high = f"{min(every):.3g}", f"{max(every):.3g}"
    alt = (
        f"Above: bits per weight of each compressed layer by block, {low if low == high else f'from {low} to {high}'},"
        f" scales included. Below: bytes of each block by kind of layer, together {size(sum(total) * step)} where the"
        f" original has {size(sum(before))}.{rest}"
    )
    return Drawing(figure, title, alt)


def frontier(data: Mapping[str, Any]) -> Drawing | None:
    """Results of one original by size and perplexity; a line through those that no other beats in both."""
    rows: Sequence[Row] = data.get("frontier") or ()
    if len(rows) < 3:
        return None
    title = "Size and accuracy"
    chosen = best(rows)
    with page(title, 4.4) as figure:
        axis = figure.subplots()
        axis.step(
            [row["bytes"] / 1e6 for row in chosen], [row["perplexity"] for row in chosen], where="post",
            color="#888888", linestyle="--", linewidth=1, label="no other is better in both",
        )  # fmt: skip
        for i, row in enumerate(rows):
            name = f"{shorten(str(row['name']))}: {size(row['bytes'])}, {row['perplexity']:.4g}"
            style = i % len(MARKERS)
            axis.plot(
                row["bytes"] / 1e6, row["perplexity"], marker=MARKERS[style], color=INKS[style], linestyle="none",
                markersize=8, markerfacecolor=INKS[style] if row in chosen else "white", label=name,
            )  # fmt: skip
        axis.set_xlabel("weights on disk, MB")
        axis.set_ylabel("perplexity (lower is better)")
        low, high = min(r["perplexity"] for r in rows), max(r["perplexity"] for r in rows)
        if high > 3 * low:
            logarithmic(axis)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    said = "; ".join(f"{size(row['bytes'])}, {row['perplexity']:.4g}" for row in rows)
    alt = (
        f"Size and perplexity of the original and {len(rows) - 1} results, by size against perplexity (original first):"
        f" {said}. {len(chosen)} of them are beaten by no other in both."
    )
    return Drawing(figure, title, alt)

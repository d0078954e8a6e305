"""The figure of clipping: how much of each matrix's range is left on its grid, along the depth."""

from collections.abc import Mapping
from typing import Any

from .series import Row, by_role
from .style import DASHES, INKS, MARKERS, Drawing, depth, page

SAME = 1.05  # where every matrix keeps its range to so much, there is nothing to see


def clipping(data: Mapping[str, Any]) -> Drawing | None:
    """Largest weight on the grid over the largest of the original.

    With levels on both sides of zero, as in QuantGPT, the largest weight on the grid is the learned clipping α.
    """
    seen: Mapping[str, list[Row]] = data.get("weights") or {}
    if not {"original", "compressed"} <= seen.keys():
        return None
    before = {_place(row): float(row["rows"]["max"]) for row in seen["original"]}
    rows = [
        {**row, "kept": float(row["rows"]["max"]) / before[_place(row)]}
        for row in seen["compressed"]
        if before.get(_place(row), 0) > 0
    ]
    kept = [row["kept"] for row in rows]
    if not kept or max(max(kept), 1 / max(min(kept), 1e-9)) < SAME:
        return None
    title = "Range of the weights that is left by clipping"
    with page(title, 4.0) as figure:
        axis = figure.subplots()
        for i, (name, listed) in enumerate(by_role(rows, lambda row: [str(row["role"])]).items()):
            style = i % len(MARKERS)
            axis.plot(
                [row["block"] for row in listed], [row["kept"] for row in listed], label=name, marker=MARKERS[style],
                linestyle=DASHES[i % len(DASHES)], color=INKS[style], linewidth=1,
            )  # fmt: skip
        axis.axhline(1.0, color="#999999", linestyle=":", linewidth=1)
        axis.set_ylim(bottom=0)
        depth(axis, [row["block"] for row in rows])
        axis.set_xlabel("block")
        axis.set_ylabel("largest weight, compressed / original")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    least = min(rows, key=lambda row: float(row["kept"]))
    alt = (
        f"Largest weight of each of {len(rows)} compressed matrices over the largest of the original, by block, one"
        f" line per kind of layer: how much of the range its clipping left. Median"
        f" {sorted(kept)[len(kept) // 2]:.2f}; the least is {least['kept']:.2f}, in block {least['block']}."
    )
    return Drawing(figure, title, alt)


def _place(row: Row) -> tuple[str, int, str]:
    return row["stack"], row["block"], row["role"]

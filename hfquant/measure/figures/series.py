"""Rows of a diagnosis put into panels: one per stack and role, each with its blocks in order."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .style import MOST, leaves, shorten

Row = Mapping[str, Any]
Series = dict[str, list[Row]]


def by_role(rows: Iterable[Row], roles: Callable[[Row], list[str]]) -> Series:
    """Title -> rows of one role in the order of their blocks.  `roles`: the modules that a row is about.

    Where the last part of a module's name does not tell roles apart, the part before it is given too; where there are
    several stacks, so is theirs.
    """
    found: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        found.setdefault((row["stack"], tuple(roles(row))), []).append(row)
    stacks = {stack for stack, _ in found}
    short = {key: leaves(key[1]) for key in found}
    titled: Series = {}
    for key, listed in found.items():
        stack, names = key
        title = short[key]
        if any(other[0] == stack and other != key and short[other] == title for other in found):
            title = shorten(", ".join(names))
        if len(stacks) > 1:
            title = f"{shorten(stack, 16)}: {title}"
        titled[title] = sorted(listed, key=lambda row: row["block"])
    return titled


def first_panels(series: Series) -> tuple[Series, str]:
    """As many as a figure has room for, and what to say of the others."""
    if len(series) <= MOST:
        return series, ""
    return dict(list(series.items())[:MOST]), f" (the first {MOST} of {len(series)} kinds of layers)"

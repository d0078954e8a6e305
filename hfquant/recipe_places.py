"""Patterns that choose weights: globs of module names, and roles such as `@attention:0:4`.

    pattern = glob | "@" role [ ":" block | ":" [ first ] ":" [ end ] ]
    role    = "attention" | "feed_forward" | "blocks"

Blocks are counted from 0 in their own stack, from the end where negative, and a range ends before `end`, as Python's
slices do.  `@attention` are the linear layers below a module of a block whose class is named an attention,
`@feed_forward` all others of the blocks, `@blocks` both.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from .errors import RecipeError

Role = Literal["attention", "feed_forward"]

_PLACE = re.compile(r"@(?P<role>attention|feed_forward|blocks)(?::(?P<first>-?\d+)?(?P<range>:(?P<end>-?\d+)?)?)?")


@dataclass(frozen=True)
class Place:
    """Where in a model a weight stands: what it works for, and in which of its stack's blocks."""

    role: Role
    block: int
    blocks: int


def matches(pattern: str, module: str, place: Place | None) -> bool:
    """Whether a pattern means this module.  place: None for what is in no block."""
    if not pattern.startswith("@"):
        return fnmatchcase(module, pattern)
    found = _read(pattern)
    if place is None or found["role"] not in ("blocks", place.role):
        return False
    if ":" not in pattern:
        return True
    first = int(found["first"]) if found["first"] else None
    if found["range"] is None:
        assert first is not None
        return place.block == (first + place.blocks if first < 0 else first)
    return place.block in range(place.blocks)[first : int(found["end"]) if found["end"] else None]


def check(patterns: Iterable[str]) -> None:
    """Raises RecipeError if one of these begins with @ and is no role."""
    for pattern in patterns:
        if pattern.startswith("@"):
            _read(pattern)


def _read(pattern: str) -> re.Match[str]:
    found = _PLACE.fullmatch(pattern)
    if not found or pattern.endswith(f"{found['role']}:"):
        raise RecipeError(
            f"cannot read `{pattern}` as a part of a model",
            "write `@attention`, `@feed_forward` or `@blocks`, and after it `:3` or `:0:4` for some blocks only",
        )
    return found

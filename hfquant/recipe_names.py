"""Shorthand: a recipe written as a name.

    recipe      = step { "+" step }
    step        = method [ "-" what ] [ "-" numbers ]
    numbers     = grids [ "kv" bits [ "q" bits ] ]
    grids       = "w" bits [ "w" bits ] [ "a" bits ] [ "g" group ] [ "sym" | "asym" ]
                | "w" bits [ "w" bits ] [ "g" group ] [ "sym" | "asym" ] activations
    activations = "a" bits [ "g" group | "token" | "tensor" | "static" ] [ "sym" | "asym" ]

`rtn-w4g64`, `gptq-w8` (no group: one scale per output channel), `gptq-w3g128sym`,
`sparsegpt-2of4+gptq-w4g128+lorc-r8`.  `w4w8` is 4 bit with 8 bit in attention.  `w4a8g64` rounds each token's
activations to 8 bit, and 64 weights share a scale; in `w4g64a8g32` 32 activations share one as well.  `w8a8kv8` keeps
keys and values in 8 bit when text is generated, `kv8q8` compares them with queries in 8 bit.  What a method makes of
`what` (2of4, 50, r8) is its own business.
"""

import re
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError

GRAMMAR = "write `<method>-w<bits>g<group>`, e.g. `gptq-w4g128`; without `g<group>`: one scale per output channel"

_WEIGHTS = r"w(?P<bits>\d+)(?:w(?P<attention>\d+))?"
_GROUP = r"(?:g(?P<group>\d+))?(?P<symmetry>sym|asym)?"
_ACTIVATIONS = r"a(?P<abits>\d+)(?:g(?P<agroup>\d+)|(?P<per>token|tensor|static))?(?P<asymmetry>sym|asym)?"
_CACHE = r"kv(?P<kvbits>\d+)(?:q(?P<queries>\d+))?"
_NUMBERS = (
    re.compile(rf"{_WEIGHTS}(?:a(?P<abits>\d+))?{_GROUP}(?:{_CACHE})?"),
    re.compile(rf"{_WEIGHTS}{_GROUP}{_ACTIVATIONS}(?:{_CACHE})?"),
)
_STEP = re.compile(r"(?P<method>[a-z][a-z0-9_]*)(?:-(?P<what>(?!w\d)[a-z0-9.]+))?(?:-(?P<numbers>w\d\w*))?")


@dataclass(frozen=True)
class Numbers:
    """`w4a8g64sym`.  What is None is what the name does not say.

    activations, kv_cache: as the long form writes them; {"bits": 16} leaves them alone.
    """

    bits: int
    attention_bits: int | None
    activations: dict[str, Any] | None
    group_size: int
    symmetric: bool | None
    kv_cache: dict[str, Any] | None = None

    @property
    def grid(self) -> dict[str, Any]:
        """The grid part, as the long form writes it."""
        grid: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        return grid if self.symmetric is None else grid | {"symmetric": self.symmetric}


@dataclass(frozen=True)
class NamedStep:
    method: str
    what: str | None
    numbers: Numbers | None


def read_numbers(text: str) -> Numbers:
    """Read `w4g64`.  Raises RecipeError if it is something else."""
    found = next((found for pattern in _NUMBERS if (found := pattern.fullmatch(text))), None)
    if not found or found["group"] == "0":
        raise RecipeError(
            f"cannot read `{text}` as bits and group",
            "write `w4g64`, `w8` (per channel), `w3g128sym` or `w4g64asym`",
        )
    return Numbers(
        bits=int(found["bits"]),
        attention_bits=int(found["attention"]) if found["attention"] else None,
        activations=_activations(found.groupdict()) if found["abits"] else None,
        group_size=int(found["group"] or -1),
        symmetric=_symmetric(found["symmetry"]),
        kv_cache=_cache(found) if found["kvbits"] else None,
    )


def read_grid(text: str) -> dict[str, Any]:
    """Read `w4g64` where only a grid may stand.  Raises RecipeError if it is something else."""
    numbers = read_numbers(text)
    if numbers.attention_bits or numbers.activations not in (None, {"bits": 16}) or numbers.kv_cache:
        raise RecipeError(
            f"`{text}` is more than a grid",
            "write `grid: w4g64`, `activations: a8`, `kv_cache: kv8` and `overrides: {'@attention': w8}` as keys of "
            "their own",
        )
    return numbers.grid


def read_activations(text: str) -> dict[str, Any]:
    """Read `a8`, `a8static` or `a8g64`.  Raises RecipeError if it is something else."""
    found = re.fullmatch(_ACTIVATIONS, text)
    if not found:
        raise RecipeError(
            f"cannot read `{text}` as activations", "write `a8` (a scale per token), `a8g64`, `a8tensor` or `a8static`"
        )
    return _activations(found.groupdict())


def read_cache(text: str) -> dict[str, Any]:
    """Read `kv8`.  Raises RecipeError if it is something else."""
    found = re.fullmatch(_CACHE, text)
    if not found:
        raise RecipeError(f"cannot read `{text}` as a cache", "write `kv8`, `kv4`, `kv2` or `kv8q8`")
    return _cache(found)


def _cache(found: re.Match[str]) -> dict[str, Any]:
    said = {"bits": int(found["kvbits"])}
    return said | {"queries": int(found["queries"])} if found["queries"] else said


def _activations(found: dict[str, str | None]) -> dict[str, Any]:
    said: dict[str, Any] = {"bits": int(found["abits"] or 0)}
    if group := found.get("agroup"):
        said |= {"per": "group", "group_size": int(group)}
    elif per := found.get("per"):
        said |= {"per": per}
    symmetric = _symmetric(found.get("asymmetry"))
    return said if symmetric is None else said | {"symmetric": symmetric}


def _symmetric(text: str | None) -> bool | None:
    return None if text is None else text == "sym"


def read_name(name: str) -> tuple[NamedStep, ...]:
    """Read a whole shorthand.  Raises RecipeError if it is not one; methods are not looked up here."""
    steps = []
    for text in name.lower().split("+"):
        found = _STEP.fullmatch(text)
        if not found:
            where = f" of `{name}`" if text != name.lower() else ""
            raise RecipeError(f"cannot read `{text}`{where} as a step of a recipe", GRAMMAR)
        numbers = read_numbers(found["numbers"]) if found["numbers"] else None
        steps.append(NamedStep(found["method"], found["what"], numbers))
    return tuple(steps)

"""Shorthand: a recipe written as a name.

    recipe  = step { "+" step }
    step    = method [ "-" what ] [ "-" numbers ]
    numbers = "w" bits [ "a" activation bits ] [ "g" group ] [ "sym" | "asym" ]

`rtn-w4g64`, `gptq-w8` (no group: one scale per output channel), `gptq-w3g128sym`,
`sparsegpt-2of4+gptq-w4g128+lorc-r8`.  What a method makes of `what` (2of4, 50, r8) is its own business.
"""

import re
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError

GRAMMAR = "write `<method>-w<bits>g<group>`, e.g. `gptq-w4g128`; without `g<group>`: one scale per output channel"

_NUMBERS = re.compile(r"w(?P<bits>\d+)(?:a(?P<activation>\d+))?(?:g(?P<group>\d+))?(?P<symmetry>sym|asym)?")
_STEP = re.compile(r"(?P<method>[a-z][a-z0-9_]*)(?:-(?P<what>(?!w\d)[a-z0-9.]+))?(?:-(?P<numbers>w\d\w*))?")


@dataclass(frozen=True)
class Numbers:
    """`w4a8g64sym`.  `symmetric` is None where the name does not say."""

    bits: int
    activation_bits: int | None
    group_size: int
    symmetric: bool | None

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
    found = _NUMBERS.fullmatch(text)
    if not found or found["group"] == "0":
        raise RecipeError(
            f"cannot read `{text}` as bits and group",
            "write `w4g64`, `w8` (per channel), `w3g128sym` or `w4g64asym`",
        )
    # 16-bit activations are activations left alone: `w4a16` is how others write `w4`
    activation = int(found["activation"]) if found["activation"] not in (None, "16") else None
    return Numbers(
        bits=int(found["bits"]),
        activation_bits=activation,
        group_size=int(found["group"] or -1),
        symmetric=None if found["symmetry"] is None else found["symmetry"] == "sym",
    )


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

"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from .units import read_size

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `hfquant compress` wrote.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe: `bits=3`, `gptq.damp=0.05`, `overrides.*.down_proj=w8`. Repeatable.",
        show_default=False,
    ),
]


def size(text: str) -> int:
    try:
        return read_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

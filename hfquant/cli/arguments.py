"""The arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from .units import read_size

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `hfquant compress` wrote.", show_default=False)
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id or a GGUF file.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the result goes.", show_default=False)]
Fresh = Annotated[
    bool, typer.Option("--fresh/--resume", help="Start again, or go on where an interrupted run stopped.")
]
Windows = Annotated[int, typer.Option(min=1, metavar="N", help="How many windows of text the result is measured on.")]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text that the result is measured on.",
        exists=True,
        dir_okay=False,
        show_default="packaged",
    ),
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

"""`hfquant diagnose`"""

from pathlib import Path
from typing import Annotated

import typer

from . import engine
from .arguments import Json
from .output import busy, data, print_facts, print_json


def diagnose(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, dense or compressed, a Hub id or a GGUF file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where figures and data go.", show_default="MODEL/figures"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="What MODEL was made from.", show_default="the one its report names"),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Another result of the same original, to compare with. Repeatable."),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="FILE|DATASET", help="The text that is read.", show_default="packaged")
    ] = "default",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="How many sequences of it.")] = 8,
    seq_len: Annotated[int, typer.Option(min=8, metavar="L", help="Tokens in each of them.")] = 256,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Chooses them.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what the report of a compressed model tells; nothing is run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure and draw why a model is hard to compress, and what compressing did to it.

    One block is in memory at a time. The figures of a compressed model go into its card; the numbers behind them are
    in diagnosis.json.
    """
    with busy(f"looking at {model}"):
        found = engine.diagnose(
            model, out, against=against, beside=beside or [], text=text, samples=samples, seq_len=seq_len, seed=seed,
            look=not quick,
        )  # fmt: skip
    folder = out or Path(model) / "figures"
    if as_json:
        print_json(found)
    else:
        print_facts(data(), {str(folder / figure["file"]): figure["title"] for figure in found["figures"]})

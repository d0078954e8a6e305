"""`hfquant export`"""

from pathlib import Path
from typing import Annotated

import typer

from . import engine
from .arguments import Folder, Json
from .output import busy, data, print_facts, print_json
from .units import size


def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="`compressed-tensors`, `gptq`, `native`, `gguf`, `onnx` or `dense`."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="A new folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write a compressed model in another format, with the same codes and scales.

    Nothing is rounded a second time: what the format cannot say exactly is refused. `dense` unpacks the weights.
    """
    engine.read_config(folder)
    with busy(f"writing {out}"):
        report = engine.export(folder, to, out)
    if as_json:
        print_json({key: report.get(key) for key in ("wire", "output")})
    else:
        facts = {"model": str(out), "format": report["wire"]["format"], "size": size(report["output"]["bytes"])}
        print_facts(data(), facts | ({"left out": ", ".join(left)} if (left := report["wire"].get("left_out")) else {}))

"""`hfquant inspect`"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from . import engine
from .arguments import Folder, Json
from .output import busy, print_json, print_table
from .units import size

if TYPE_CHECKING:
    from ..measure.layers import LayerFacts

NUMBERS = ("bits", "group", "sparsity", "error", "size")


def inspect(folder: Folder, as_json: Json = False) -> None:
    """Show every compressed layer: bits, group, share of zeros, output error, bytes; and what each step cost."""
    stored = engine.read_config(folder)
    with busy("reading the layers"):
        rows = list(engine.inspect(folder))
    steps = engine.steps(folder)
    if as_json:
        total = {"layers": len(rows), "bytes": sum(row.bytes for row in rows)}
        print_json(
            {
                "format": stored.get("format", stored["quant_method"]),
                "total": total,
                "steps": [asdict(step) for step in steps],
                "layers": [r.as_dict() for r in rows],
            }
        )
    else:
        columns = ["layer", "shape", *NUMBERS]
        print_table(columns, [*map(_row, rows), _total(rows)], right=("shape", *NUMBERS))
        if steps:
            print()
            lines = [[s.steps, str(s.layers), "-" if s.error is None else f"{s.error:.4f}"] for s in steps]
            print_table(["after", "layers", "mean error"], lines, right=("layers", "mean error"))


def _row(layer: "LayerFacts") -> list[str]:
    return [
        layer.name,
        " x ".join(map(str, layer.shape)),
        f"{layer.bits}{'' if layer.symmetric else ' asym'}",
        "channel" if layer.group_size == -1 else str(layer.group_size),
        f"{layer.sparsity:.1%}",
        "-" if layer.error is None else f"{layer.error:.4f}",
        size(layer.bytes),
    ]


def _total(rows: "Sequence[LayerFacts]") -> list[str]:
    return [f"{len(rows)} layers", "", "", "", "", "", size(sum(row.bytes for row in rows))]

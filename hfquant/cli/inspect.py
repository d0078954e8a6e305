"""`hfquant inspect`"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from . import engine
from .arguments import Folder, Json
from .output import busy, print_json, print_table
from .units import size

if TYPE_CHECKING:
    from ..measure.layers import LayerFacts

COLUMNS = ("layer", "shape", "bits", "group", "sparsity", "rank", "activations", "error", "size")
RARE: dict[str, Callable[["LayerFacts"], bool]] = {  # shown where any layer has it
    "rank": lambda layer: layer.rank > 0,
    "activations": lambda layer: layer.activations is not None,
}


def inspect(folder: Folder, as_json: Json = False) -> None:
    """Show every compressed layer: bits, group, share of zeros, low rank, rounded inputs, output error, bytes; and what
    each step cost."""
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
        columns = [c for c in COLUMNS if c not in RARE or any(map(RARE[c], rows))]
        lines = [*map(_row, rows), _total(rows)]
        print_table(columns, [[line[c] for c in columns] for line in lines], right=tuple(columns[1:]))
        if steps:
            print()
            costs = [[s.steps, str(s.layers), "-" if s.error is None else f"{s.error:.4f}"] for s in steps]
            print_table(["after", "layers", "mean error"], costs, right=("layers", "mean error"))


def _row(layer: "LayerFacts") -> dict[str, str]:
    return {
        "layer": layer.name,
        "shape": " x ".join(map(str, layer.shape)),
        "bits": f"{layer.bits}{'' if layer.symmetric else ' asym'}",
        "group": "channel" if layer.group_size == -1 else str(layer.group_size),
        "sparsity": f"{layer.sparsity:.1%}{'' if layer.pattern in (None, 'any') else f' {layer.pattern}'}",
        "rank": str(layer.rank or "-"),
        "activations": layer.activations or "-",
        "error": "-" if layer.error is None else f"{layer.error:.4f}",
        "size": size(layer.bytes),
    }


def _total(rows: "Sequence[LayerFacts]") -> dict[str, str]:
    total = dict.fromkeys(COLUMNS, "")
    return total | {"layer": f"{len(rows)} layers", "size": size(sum(row.bytes for row in rows))}

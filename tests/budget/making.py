"""How these tests compress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfquant import compress, plan

Folders = Callable[[str], Path]
SMALL: dict[str, Any] = {"samples": 8, "seq_len": 64}


def made(model: Path, recipe: Any, out: Path) -> int:
    """Bytes of the weights that a recipe leads to."""
    for _ in compress(plan(model, recipe, out, **SMALL)):
        pass
    return (out / "model.safetensors").stat().st_size

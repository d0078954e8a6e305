"""Compression methods, one file per paper.

The file name is the registry: `gptq.py` defines the method "gptq".  A method is a class `Method`, a frozen
pydantic model whose fields are the options a recipe may set; adding one touches nothing else.

A method that takes something between its name and its bits in a recipe's shorthand (`sparsegpt-2of4-w4g64`)
says what it means in a classmethod `shorthand(what) -> dict of options`, which raises ValueError on what it
cannot read.  One that quantizes activations too has a field `activation_bits`.
"""

import importlib
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import RecipeError

if TYPE_CHECKING:
    import torch

    from ..tensors.grid import Grid
    from ..tensors.layer import Layer


class Method(Protocol):
    """Layer -> Layer, on tensors alone: no device, no file, no progress bar."""

    needs_hessian: ClassVar[bool]

    def __call__(self, layer: "Layer", grid: "Grid", scale_dtype: "torch.dtype") -> "Layer": ...


NAMES = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


def load(name: str) -> type[Any]:
    """The `Method` class of that name.  Raises RecipeError with the nearest name if there is none."""
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1)
        known = f"hfquant has {', '.join(f'`{known}`' for known in NAMES)}"
        raise RecipeError(f"unknown method `{name}`", f"did you mean `{close[0]}`? {known}" if close else known)
    found: type[Any] = importlib.import_module(f"{__name__}.{name}").Method
    return found

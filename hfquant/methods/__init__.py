"""Compression methods, one file per paper.

The file name is the registry: `gptq.py` defines the method "gptq".  A method is a class `Method`, a frozen
pydantic model whose fields are the options a recipe may set; adding one touches nothing else.

A method that takes something between its name and its bits in a recipe's shorthand (`sparsegpt-2of4-w4g64`)
says what it means in a classmethod `shorthand(what) -> dict of options`, which raises ValueError on what it
cannot read.

What else a method may say about itself, all optional:

* `kind`, of `KINDS`: what it does to a layer, which decides where in a recipe it may stand ("quantize" if not said).
  One that prunes and has a field `joint` can round in the same pass.
* `scope = "model"`: it trains the whole model (`hfquant train`), alone in its recipe.
* `defaults`: keys of a recipe and their values where the recipe does not give them; of `grid`, where it is given, the
  keys that it leaves out.
* `rewrites = True`: it gives the model other weights that compute the same, before its blocks are looked at:
  `rewrite(source) -> source`, and `outline(source)` the same as far as headers tell, without reading a weight.
* `rowwise = False`: the rows of a weight influence each other, so weights with the same inputs, which otherwise go
  through as one tall matrix, are handled one by one.
* `experts = False`: what it makes cannot be stored of fused experts; they go without it.
* `encodes(encoding, shape)`, which returns the encoding with what it adds to how a weight [out, in] is stored.
* `check(shape)`, which raises ValueError for a weight [out, in] that it cannot handle, before any work starts.
* `by_layer`, the names of options that map patterns of layers (globs and roles, as `keep` of a recipe has them) to
  values; where the method is called, they map the names of the layers at hand, without `.weight`.
"""

import importlib
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import RecipeError

KINDS = ("rewrite", "block", "prune", "quantize", "compensate", "distill")  # in the order of a recipe

if TYPE_CHECKING:
    import torch

    from ..tensors.grid import Grid
    from ..tensors.layer import Layer


class Method(Protocol):
    """Layer -> Layer, on tensors alone: no device, no file, no progress bar."""

    @property
    def needs_hessian(self) -> bool: ...

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


def scope(name: str) -> str:
    """What the method of that name is called with: one weight ("linear"), "block", "finished" block, or "model"."""
    found: str = getattr(load(name), "scope", "linear")
    return found


def kind(name: str) -> str:
    """What the method of that name does to a layer, one of `KINDS`."""
    method = load(name)
    found: str = getattr(method, "kind", "block" if scope(name) == "block" else "quantize")
    return found

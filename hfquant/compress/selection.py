"""Which weights of a model a recipe compresses, and how they will be stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RecipeError
from ..model.blocks import stacks, weights
from ..recipe import Recipe
from ..tensors import formats
from ..tensors.encoding import Activations, Encoding
from ..tensors.formats import Format, Wire
from ..tensors.grid import Grid
from ..tensors.shards import nbytes

STORED_AS = {"head": "linear"}  # kinds that are another one to a format


@dataclass(frozen=True)
class Target:
    """One weight matrix to compress, or one per expert.

    parameter: its name in the model.  layer: the name that recipe and wire know it by, which is the module's (the
    matrices of fused experts share a grid).  shape: (out, in).  activations: how its inputs are rounded, if they are.
    """

    parameter: str
    layer: str
    kind: str
    shape: tuple[int, int]
    grid: Grid
    activations: Activations | None = None


def select(model: nn.Module, recipe: Recipe) -> dict[str, Target]:
    """Parameter name -> target, for every weight that the recipe gives a grid.

    Raises RecipeError if that is none.
    """
    found: dict[str, Target] = {}
    for name, kind, shape in [*_inside(model), *_ends(model)]:
        layer = name.rpartition(".")[0]
        spec = recipe.grid_for(layer, kind)
        if spec is not None:
            found[name] = Target(name, layer, kind, shape, spec.grid())
    if not found:
        raise RecipeError(
            f"recipe `{recipe.name}` leaves every layer of this model as it is",
            "look at its `keep` and `overrides`, and at modules_to_not_convert",
        )
    return found


def _inside(model: nn.Module) -> list[tuple[str, str, tuple[int, int]]]:
    """(parameter, kind, (out, in)) of the weights inside the blocks."""
    found = []
    for path in (path for stack in stacks(model) for path in stack.blocks):
        block = model.get_submodule(path)
        found += [(f"{path}.{w.name}", w.kind, w.shape(block)) for w in weights(block)]
    return found


def _ends(model: nn.Module) -> list[tuple[str, str, tuple[int, int]]]:
    """The same of the token embeddings, and of the head where it has a weight of its own."""
    found = []
    tied = getattr(model, "all_tied_weights_keys", {})
    whole: Any = model
    table, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    for name, module in model.named_modules():
        parameter = f"{name}.weight"
        if parameter in tied:
            continue
        if module is table and isinstance(module, nn.Embedding):
            found.append((parameter, "embedding", (module.num_embeddings, module.embedding_dim)))
        elif module is head and isinstance(module, nn.Linear):
            found.append((parameter, "head", (module.out_features, module.in_features)))
    return found


def expected(target: Target, recipe: Recipe) -> Encoding:
    """How a target will be stored, as far as its recipe tells beforehand.

    A method whose result is more than a grid says what it adds in `encodes(encoding, shape) -> Encoding`.
    """
    encoding = Encoding(target.grid, activations=target.activations)
    if target.kind in ("embedding", "head"):  # these are rounded, whatever the steps are
        return encoding
    for step in recipe.steps:
        method = step.build()
        encodes: Callable[[Encoding, tuple[int, int]], Encoding] | None = getattr(method, "encodes", None)
        if encodes is not None and (target.kind != "experts" or getattr(method, "experts", True)):
            encoding = encodes(encoding, target.shape)
    return encoding


def stored_bytes(
    fmt: Format, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype, copies: int = 1
) -> int:
    """What a weight, or so many like it, takes on disk, but for the file's header."""
    return copies * sum(nbytes(size, dtype) for size, dtype in fmt.spec(encoding, shape, scale_dtype).values())


def wire_for(targets: Mapping[str, Target], model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> Wire:
    """How these targets are stored: the recipe's format, or the most widely readable one that can.

    dtype: what the model is stored in.  What the layers turn out to be is known when they are finished:
    `Wire.as_written`.  Raises FormatError where the recipe's format cannot store a layer.
    """
    layers = {t.layer: (expected(t, recipe), t.shape, STORED_AS.get(t.kind, t.kind)) for t in targets.values()}
    name = formats.choose(layers) if recipe.format == "auto" else recipe.format
    formats.check(name, layers)
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    # float32 scales are a waste, except first in the model: transformers takes a model's dtype from its first
    # floating parameter, the scale of a packed embedding
    halved = dtype == torch.float32 and not any(t.kind == "embedding" for t in targets.values())
    return Wire(
        format=name,
        layers={layer: formats.load(name).keeps(encoding) for layer, (encoding, _, _) in layers.items()},
        ignore=tuple(ignore),
        scale_dtype=torch.float16 if name == "gptq" or halved else dtype,
    )

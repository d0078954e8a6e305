"""Which weights a recipe compresses in a model, how they will be stored, and what that takes: from headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError, ResourceError, SourceError
from ..machine import multiplies_bfloat16
from ..model.blocks import Stack, stacks
from ..model.skeleton import Skeleton
from ..model.source import Source
from ..recipe import Recipe
from ..tensors import formats
from ..tensors.formats import Wire
from ..tensors.grid import Grid
from .estimate import Estimate, estimate
from .portions import ROOM, held
from .selection import Target, select, stored_bytes, wire_for
from .streaming import largest_batch


@dataclass(frozen=True)
class LayerPlan:
    """One weight that will be compressed.  `shape` is (out, in), of each expert for fused experts."""

    name: str
    kind: str
    shape: tuple[int, int]
    grid: Grid
    bytes_before: int
    bytes_after: int
    block: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What headers alone tell: which weights a recipe compresses, and how they will be stored.  See `Plan`."""

    skeleton: Skeleton
    stacks: tuple[Stack, ...]
    targets: Mapping[str, Target]
    wire: Wire
    layers: Mapping[str, LayerPlan]
    dtype: torch.dtype


def lay_out(source: Source, recipe: Recipe, device: str = "cpu", *, training: bool = False) -> Layout:
    """The layout of a compression, or of a training; no weight is read.  Raises as `plan` does."""
    if recipe.trains and not training:
        raise RecipeError(
            f"recipe `{recipe.name}` trains the whole model",
            "use `hfquant train`, with the same recipe and a text",
        )
    if recipe.budget is not None:
        raise RecipeError(
            f"recipe `{recipe.name}` has a budget, and no grids yet",
            "use `hfquant compress`, `HfQuantConfig`, or the recipe of `hfquant.budget.choose_recipe(...)`",
        )
    dtype = _stored_dtype(recipe, source)
    skeleton = Skeleton(source, compute_dtype(source, device))
    if missing := skeleton.missing():
        raise SourceError(
            f"{source.id} lacks {len(missing)} of its model's weights, `{missing[0]}` among them",
            "download the model again, or check `architectures` in config.json",
        )
    found = tuple(stacks(skeleton.model))
    targets = select(skeleton.model, recipe, dtype)
    wire = wire_for(targets, skeleton.model, recipe, dtype)
    layers = _layers(targets, wire, found, skeleton)
    return Layout(skeleton=skeleton, stacks=found, targets=targets, wire=wire, layers=layers, dtype=dtype)


def fit(
    laid: Layout,
    recipe: Recipe,
    tokens: Tensor | None,
    max_memory: int | None = None,
    parts: int = 1,
    begun: int | None = None,
) -> tuple[int, int, Estimate]:
    """The largest batch, and the most room for statistics, whose estimated peak stays below `max_memory`, and its
    estimate.  Smaller batches cost little time, less room costs runs through the blocks; only batches, in whose order
    sums are added, decide bytes.

    parts: that the calibration is cut into.  Of the tokens only the shape matters.  begun: the batch of a run to go on
    with, which fitted and decides its bytes.
    Raises ResourceError if no batch is small enough.
    """
    batch, room = begun or (1 if tokens is None else largest_batch(tokens, recipe, parts)), ROOM
    layers = list(laid.layers.values())
    least = held(recipe, layers, laid.skeleton.source.dtype.itemsize, 0).largest
    while True:
        expected = estimate(laid.skeleton, recipe, layers, tokens, batch, laid.dtype, room)
        if max_memory is None or expected.peak_memory <= max_memory:
            return batch, room, expected
        if batch > 1 and begun is None:
            batch //= 2
        elif tokens is not None and room > least:
            room = max(least, room // 2)
        elif begun is not None:
            return batch, room, expected
        else:
            raise ResourceError(
                f"about {expected.peak_memory / 1e6:,.0f} MB are needed, {max_memory / 1e6:,.0f} MB are allowed",
                "allow more with `--max-memory`, use fewer or shorter samples, or a recipe without calibration",
            )


def compute_dtype(source: Source, device: str = "cpu") -> torch.dtype:
    """What the blocks compute in: bfloat16 where the hardware multiplies it faster than float32."""
    if device != "cpu":
        return torch.bfloat16 if source.dtype == torch.float32 else source.dtype
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def _stored_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    """What is not quantized is stored as this: 16 bit unless asked otherwise."""
    if recipe.dtype == "auto":
        return torch.bfloat16 if source.dtype.itemsize > 2 else source.dtype
    if recipe.dtype == "keep":
        return source.dtype
    named: torch.dtype = getattr(torch, recipe.dtype)
    return named


def _layers(
    targets: Mapping[str, Target], wire: Wire, found: tuple[Stack, ...], skeleton: Skeleton
) -> dict[str, LayerPlan]:
    blocks = [name for stack in found for name in stack.blocks]
    fmt = formats.load(wire.format)
    layers = {}
    for name, target in targets.items():
        block = next((i for i, prefix in enumerate(blocks) if name.startswith(prefix + ".")), len(blocks))
        parameter = skeleton.model.get_parameter(name)
        copies = parameter.shape[0] if target.kind == "experts" else 1
        after = stored_bytes(fmt, wire.layers[target.layer], target.shape, wire.scale_dtype, copies)
        before = parameter.numel() * skeleton.source.dtype.itemsize
        layers[name] = LayerPlan(name, target.kind, target.shape, target.grid, before, after, block)
    return layers

"""What a compression will need: sizes by arithmetic, memory by a model of the pipeline, time by a short probe."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.skeleton import Skeleton
from ..recipe import Recipe

if TYPE_CHECKING:
    from .layout import LayerPlan

LIBRARIES = 420_000_000  # bytes that Python, torch and transformers take before anything is loaded


@dataclass(frozen=True)
class Estimate:
    """bytes unless named otherwise."""

    parameters: int
    bytes_before: int
    bytes_after: int
    peak_memory: int
    disk: int
    seconds: float | None


def estimate(
    skeleton: Skeleton,
    recipe: Recipe,
    layers: "Sequence[LayerPlan]",
    tokens: Tensor | None,
    batch: int,
    dtype: torch.dtype,
) -> Estimate:
    """From shapes alone, but for the probe of the machine's speed.  dtype: of what is stored unquantized."""
    source = skeleton.source
    replaced = {name for layer in layers for name in skeleton.stored.get(layer.name, [])}
    kept = sum(
        t.numel * (dtype if t.dtype == source.dtype else t.dtype).itemsize
        for name, t in source.tensors.items()
        if name not in replaced
    )
    packed = sum(layer.bytes_after for layer in layers)
    hidden = int(getattr(source.config.get_text_config(decoder=True), "hidden_size", 0))
    streams = 0 if tokens is None else 2 * tokens.numel() * hidden * skeleton.dtype.itemsize
    return Estimate(
        parameters=source.parameters,
        bytes_before=source.total_bytes,
        bytes_after=kept + packed,
        peak_memory=_peak(skeleton, layers, tokens, batch, hidden, recipe.distills),
        disk=kept + 2 * packed + streams,
        seconds=_seconds(skeleton, recipe, layers, tokens),
    )


def _peak(
    skeleton: Skeleton,
    layers: "Sequence[LayerPlan]",
    tokens: Tensor | None,
    batch: int,
    hidden: int,
    distills: bool,
) -> int:
    """The embeddings while calls are recorded, or one block with its statistics and activations, or it in training."""
    blocks: dict[int, int] = {}
    for layer in layers:
        blocks[layer.block] = blocks.get(layer.block, 0) + layer.bytes_before // skeleton.source.dtype.itemsize
    widest = max(layer.shape[1] for layer in layers)
    largest = max(layer.shape[0] * layer.shape[1] for layer in layers)
    weights = max(blocks.values()) * (4 + skeleton.dtype.itemsize)  # float32 masters, and what runs
    if tokens is None:
        return LIBRARIES + weights + 16 * largest
    inside = sum(p.numel() for n, p in skeleton.model.named_parameters() if n in {layer.name for layer in layers})
    outside = (sum(p.numel() for p in skeleton.model.parameters()) - inside) * skeleton.dtype.itemsize
    rows = batch * tokens.shape[1]
    activations = rows * (6 * hidden + 5 * widest) * skeleton.dtype.itemsize + 4 * rows * widest
    solving = 28 * widest * widest + 20 * largest  # H, its float64 factors; W, its errors and codes
    training = 0
    if distills:  # codes before rounding, their gradients and moments, what runs; what a step keeps for its way back
        training = 36 * max(blocks.values()) + rows * (24 * hidden + 14 * widest) * 4
    return LIBRARIES + max(outside + activations, weights + activations + solving, weights + training)


def _seconds(skeleton: Skeleton, recipe: Recipe, layers: "Sequence[LayerPlan]", tokens: Tensor | None) -> float:
    """Arithmetic over the speed of a small product, plus what is bound by memory."""
    forward, exact = _speed(skeleton.dtype), _speed(torch.float32)
    weights = sum(layer.bytes_before // skeleton.source.dtype.itemsize for layer in layers)
    fitting = 60 * weights / 0.4e9  # 40 ranges tried, a few passes over memory each
    if tokens is None:
        return fitting
    passes = 4.0  # the layers of a block are observed one behind the other, then the block is run
    observe = sum(tokens.numel() * layer.shape[1] ** 2 for layer in layers) * 0.6
    solve = sum(layer.shape[0] * layer.shape[1] ** 2 * 14.0 for layer in layers)
    taught = sum(step.options["steps"] * step.options["tokens"] for step in recipe.steps if step.method == "lkd")
    learn = 3.5 * 2 * weights * taught / forward  # forward, and twice as much back
    return fitting + learn + passes * 2 * weights * tokens.numel() / forward + (observe + solve) / exact


def forward_seconds(parameters: int, tokens: int, dtype: torch.dtype) -> float:
    """How long a model of that size takes to read so many tokens on this machine."""
    return 2.0 * parameters * tokens / _speed(dtype)


def _speed(dtype: torch.dtype, size: int = 768) -> float:
    """Floating-point operations per second of a matrix product."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * size**3 / max(time.perf_counter() - start, 1e-6)

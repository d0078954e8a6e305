"""What a compression will need: sizes by arithmetic, memory by a model of the pipeline, time by a short probe."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..llvm import refused
from ..machine import resident_memory
from ..methods.lkd import Method as Lkd
from ..model.calibration import GENERATED
from ..model.inputs import positions
from ..model.skeleton import Skeleton
from ..recipe import Recipe
from .portions import ROOM, Held, held, nbytes

if TYPE_CHECKING:
    from .layout import LayerPlan

# what GPTQ's sweep and refinement take, measured: operations at a product's speed per weight and input feature, and
# seconds per weight of what is bound by memory; in torch, and with generated loops
SOLVE, SWEEP = (95.0, 28.0), (3e-7, 3e-8)
FIT = (60, 6)  # passes over memory for 40 ranges
LIBRARIES = 420_000_000  # bytes that Python, torch and transformers take at least before anything is loaded
LATER = 30_000_000  # and what of them is loaded only when it is needed
READING = 145_000_000  # bytes while a text is made into tokens, measured with the packaged one


@dataclass(frozen=True)
class Estimate:
    """bytes unless named otherwise."""

    parameters: int
    bytes_before: int
    bytes_after: int
    peak_memory: int
    disk: int
    seconds: float | None


def base() -> int:
    """What the process holds without any work of ours; libraries differ with what else is installed."""
    return max(LIBRARIES, resident_memory()) + LATER


def estimate(
    skeleton: Skeleton,
    recipe: Recipe,
    layers: "Sequence[LayerPlan]",
    tokens: Tensor | None,
    batch: int,
    dtype: torch.dtype,
    room: int = ROOM,
) -> Estimate:
    """From shapes alone, but for the probe of the machine's speed.

    dtype: of what is stored unquantized.  room: bytes of statistics that may be held together.
    """
    source = skeleton.source
    replaced = {name for layer in layers for name in skeleton.stored.get(layer.name, [])}
    kept = sum(
        t.numel * (dtype if t.dtype == source.dtype else t.dtype).itemsize
        for name, t in source.tensors.items()
        if name not in replaced
    )
    packed = sum(layer.bytes_after for layer in layers)
    statistics = held(recipe, layers, source.dtype.itemsize, room)
    streams = 0 if tokens is None else _streams(skeleton, recipe, layers, tokens)
    reading = READING if tokens is not None and not recipe.generates else 0
    return Estimate(
        parameters=source.parameters,
        bytes_before=source.total_bytes,
        bytes_after=kept + packed,
        peak_memory=base()
        + max(
            reading,
            _peak(skeleton, layers, tokens, batch, statistics, recipe.distills),
            _proof(skeleton, layers) if recipe.rewrites else 0,
            _writing(skeleton, tokens) if tokens is not None and recipe.generates else 0,
        ),
        disk=kept + 2 * packed + streams,
        seconds=_seconds(skeleton, recipe, layers, tokens, statistics.runs),
    )


def hidden_size(skeleton: Skeleton) -> int:
    """Numbers in a hidden state."""
    return int(getattr(skeleton.source.config.get_text_config(decoder=True), "hidden_size", 0))


def _streams(skeleton: Skeleton, recipe: Recipe, layers: "Sequence[LayerPlan]", tokens: Tensor) -> int:
    """Bytes of disk for hidden states: those before and after a block; of an encoder that is done, its last and a copy
    for the decoder's calls; where the original model runs beside, its own and what one block's layers read; and what
    the finished layers of a block return, where they are remembered."""
    samples, seq = tokens.shape
    lengths = positions(skeleton.source.config, seq)
    row = hidden_size(skeleton) * skeleton.dtype.itemsize
    before = 2 * row * lengths["encoder"] * samples if "encoder" in lengths else 0
    longest = max(lengths.values()) * samples
    streams = max(2 * row * longest, before + 2 * row * seq * samples)
    built = [step.build() for step in recipe.steps]
    if any(getattr(step, "needs_original", False) for step in built):
        streams += (2 * row + _widest(layers, 1) * skeleton.dtype.itemsize) * longest
    if any(getattr(step, "true_sequential", False) for step in built):
        streams += _widest(layers, 0) * skeleton.dtype.itemsize * longest  # what finished layers return, see `outputs`
    return streams


def _widest(layers: "Sequence[LayerPlan]", side: int) -> int:
    """The most features that a block's layers have together; side: 0 of their outputs, 1 of their inputs."""
    widths: dict[int, int] = {}
    for layer in layers:
        if layer.kind != "experts":
            widths[layer.block] = widths.get(layer.block, 0) + layer.shape[side]
    return max(widths.values(), default=0)


def _peak(
    skeleton: Skeleton,
    layers: "Sequence[LayerPlan]",
    tokens: Tensor | None,
    batch: int,
    statistics: Held,
    distills: bool,
) -> int:
    """The embeddings while calls are recorded, or one block with its statistics and activations, or it in training."""
    blocks: dict[int, int] = {}
    packed: dict[int, int] = {}
    for layer in layers:
        blocks[layer.block] = blocks.get(layer.block, 0) + layer.bytes_before // skeleton.source.dtype.itemsize
        packed[layer.block] = packed.get(layer.block, 0) + layer.bytes_after
    widest = max(layer.shape[1] for layer in layers)
    largest = max(layer.shape[0] * layer.shape[1] for layer in layers)
    # float32 masters, what runs, what is packed; and of experts, the codes of all
    weights = max(blocks.values()) * (4 + skeleton.dtype.itemsize) + max(packed.values())
    experts = [layer.bytes_before // skeleton.source.dtype.itemsize for layer in layers if layer.kind == "experts"]
    weights += 2 * max(experts, default=0)
    if tokens is None:
        return weights + 16 * largest
    inside = sum(p.numel() for n, p in skeleton.model.named_parameters() if n in {layer.name for layer in layers})
    outside = (size_of(skeleton) - inside) * skeleton.dtype.itemsize
    rows = batch * max(positions(skeleton.source.config, tokens.shape[1]).values())
    hidden = hidden_size(skeleton)
    activations = rows * (6 * hidden + 5 * widest) * skeleton.dtype.itemsize + 4 * rows * widest
    # H, its float64 factors; W, its errors and codes; and the statistics that wait for their turn
    solving = 28 * widest * widest + 20 * largest + max(0, statistics.together - nbytes(widest))
    training = 0
    if distills:  # codes before rounding, their gradients and moments, what runs; what a step keeps for its way back
        training = 36 * max(blocks.values()) + rows * (24 * hidden + 14 * widest) * 4
    return max(outside + activations, weights + activations + solving, weights + training)


def _writing(skeleton: Skeleton, tokens: Tensor) -> int:
    """While the whole model writes its calibration text: its weights, and keys and values of a batch, in float32."""
    config = skeleton.source.config.get_text_config(decoder=True)
    cached = 2 * getattr(config, "num_hidden_layers", 0) * hidden_size(skeleton) * min(GENERATED, tokens.shape[0])
    return 4 * (size_of(skeleton) + cached * tokens.shape[1])


def size_of(skeleton: Skeleton) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in skeleton.model.parameters())


def _proof(skeleton: Skeleton, layers: "Sequence[LayerPlan]") -> int:
    """While a model that is rewritten as a whole is run before and after: float32, one block at a time."""
    inside = {layer.name for layer in layers}
    sizes = [p.numel() for n, p in skeleton.model.named_parameters() if n not in inside]
    blocks: dict[int, int] = {}
    for layer in layers:
        blocks[layer.block] = blocks.get(layer.block, 0) + layer.bytes_before // skeleton.source.dtype.itemsize
    return 4 * (sum(sizes) + max(sizes, default=0) + 2 * max(blocks.values()))


def _seconds(
    skeleton: Skeleton, recipe: Recipe, layers: "Sequence[LayerPlan]", tokens: Tensor | None, runs: int
) -> float:
    """Arithmetic over the speed of a small product, plus what is bound by memory."""
    forward, exact = _speed(skeleton.dtype), _speed(torch.float32)
    weights = sum(layer.bytes_before // skeleton.source.dtype.itemsize for layer in layers)
    generated = refused() is None
    fitting = FIT[generated] * weights / 0.4e9
    if tokens is None:
        return fitting
    built: list[Any] = [step.build() for step in recipe.steps]
    beside = any(getattr(step, "needs_original", False) for step in built)
    # the original where it is looked at too, what is observed, and what the next block will see, unless that was
    # observed; beside the products there are attention and what is bound by memory
    passes = 1.25 * (beside + runs + (not any(getattr(step, "one_pass", False) for step in built)))
    solve = 0.0
    if any(getattr(step, "needs_hessian", False) for step in built):
        solve += tokens.numel() * _squares(layers) * (3.1 if beside else 1.1)  # H is symmetric, C is not
        solve += SOLVE[generated] * sum(layer.shape[0] * layer.shape[1] ** 2 for layer in layers)
        fitting += SWEEP[generated] * weights
    narrowest = min((layer.grid.bits for layer in layers), default=16)
    lessons: list[Lkd] = [step for step in built if isinstance(step, Lkd)]
    taught = sum(lesson.count(narrowest) * lesson.tokens for lesson in lessons)
    learn = 3.5 * 2 * weights * taught / forward  # forward, and twice as much back
    if recipe.generates:  # in batches, and in a decoder's steps the weights' way from memory is as long as products
        learn += 2 * 2 * size_of(skeleton) * tokens.numel() / exact
    return fitting + learn + passes * 2 * weights * tokens.numel() / forward + solve / exact


def _squares(layers: "Sequence[LayerPlan]") -> int:
    """Σ in² over the inputs that are summed.  Layers side by side read the same one: q, k and v; gate and up."""
    beside: dict[tuple[int, str, int], int] = {}
    for layer in layers:
        if layer.kind != "experts":
            key = layer.block, layer.name.rsplit(".", 2)[0], layer.shape[1]
            beside[key] = beside.get(key, 0) + 1
    shared = sum(-(-count // 3) * key[2] ** 2 for key, count in beside.items())
    return shared + sum(layer.shape[1] ** 2 for layer in layers if layer.kind == "experts")


def forward_seconds(parameters: int, tokens: int, dtype: torch.dtype) -> float:
    """How long a model of that size takes to read so many tokens on this machine."""
    return 2.0 * parameters * tokens / _speed(dtype)


@cache
def _speed(dtype: torch.dtype, size: int = 768) -> float:
    """Floating-point operations per second of a matrix product."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * size**3 / max(time.perf_counter() - start, 1e-6)

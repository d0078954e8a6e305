"""Compress one block: observe its inputs, apply the recipe's steps to its weights, put the result in their place."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods import Method
from ..model.blocks import Weight
from ..tensors.grid import Grid
from ..tensors.layer import Layer, Quantized
from .activations import Stream
from .observe import Statistics, discover, observe, record_original
from .streaming import Passage

STARVED = 64  # an expert that fewer calibration tokens reached is reported


@dataclass(frozen=True)
class Finished:
    """A weight that is done.  Q holds all experts' rows one after the other."""

    weight: Weight
    Q: Quantized
    method: str
    error: float | None
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What is to be done with one block: a grid for every weight that is not kept, and the steps in order."""

    grids: Mapping[Weight, Grid]
    steps: Sequence[tuple[str, Method]]
    scale_dtype: torch.dtype

    @property
    def needs_hessian(self) -> bool:
        return any(step.needs_hessian for _, step in self.steps)

    @property
    def needs_original(self) -> bool:
        return any(getattr(step, "needs_original", False) for _, step in self.steps)

    @property
    def sequential(self) -> bool:
        return any(getattr(step, "true_sequential", False) for _, step in self.steps)


@torch.no_grad()
def compress_block(
    block: nn.Module,
    masters: Mapping[Weight, Tensor],
    work: Work,
    passage: Passage | None,
    index: int,
    original: tuple[Stream, Stream] | None = None,
) -> Iterator[Finished]:
    """Finish the weights of one block, one after the other; afterwards the block runs with the finished ones.

    masters: the weights as trained, float32 [out, in] or [experts, out, in].  passage: the calibration stream, None
    where no step looks at inputs.  original: the original model's hidden states before this block, and where those
    after it are to be written.
    """
    weights = [w for w in masters if w in work.grids]
    groups = discover(block, passage, index, weights) if passage is not None else []
    inputs: dict[str, Stream] = {}
    if passage is not None and original is not None:
        inputs = record_original(block, passage, index, groups, *original)
    reached = {member for group in groups for member in group.members}
    stages = [[group] for group in groups] if work.sequential else [groups]
    for stage in stages:
        seen = observe(block, passage, index, stage, inputs) if passage is not None and stage else {}
        for group in stage:
            statistics = {expert: s for (g, expert), s in seen.items() if g == group}
            for done in _finish(group.members, masters, work, statistics):
                done.weight.put(block, done.Q.dequantize().view_as(masters[done.weight]))
                yield done
            if group.leader in inputs:
                inputs.pop(group.leader).delete()
    note = ("never reached in calibration",) if passage is not None else ()
    for weight in weights:
        if weight not in reached:
            for done in _finish((weight,), masters, work, {}, note):
                weight.put(block, done.Q.dequantize().view_as(masters[weight]))
                yield done


def _finish(
    members: Sequence[Weight],
    masters: Mapping[Weight, Tensor],
    work: Work,
    statistics: Mapping[int, Statistics],
    notes: tuple[str, ...] = (),
) -> Iterator[Finished]:
    if members[0].kind == "experts":
        yield _finish_experts(members[0], masters[members[0]], work, statistics, notes)
        return
    # Rows do not influence each other: weights that share H and grid go through the steps as one tall matrix.
    by_grid: dict[Grid, list[Weight]] = {}
    for member in members:
        by_grid.setdefault(work.grids[member], []).append(member)
    H, C = (statistics[0].H, statistics[0].C) if statistics else (None, None)
    for grid, same in by_grid.items():
        start = time.perf_counter()
        tall = Layer(name=same[0].name, W=torch.cat([masters[w].float() for w in same]), H=H, C=C, notes=notes)
        tall = _steps(tall, grid, work)
        seconds, at = time.perf_counter() - start, 0
        for weight in same:
            rows = slice(at, at := at + masters[weight].shape[0])
            layer = tall.rows(rows)
            assert layer.Q is not None
            share = seconds * layer.W.shape[0] / tall.W.shape[0]
            yield Finished(weight, layer.Q, work.steps[-1][0], layer.error(), share, layer.notes)


def _finish_experts(
    weight: Weight, W: Tensor, work: Work, statistics: Mapping[int, Statistics], notes: tuple[str, ...]
) -> Finished:
    start = time.perf_counter()
    layers = []
    for expert in range(W.shape[0]):
        seen = statistics.get(expert)
        layer = Layer(name=f"{weight.name}[{expert}]", W=W[expert].float(), H=None if seen is None else seen.H)
        layers.append(_steps(layer, work.grids[weight], work))
    starved = [e for e in range(W.shape[0]) if (statistics[e].tokens if e in statistics else 0) < STARVED]
    if statistics and starved:
        counts = ", ".join(f"{e} ({statistics[e].tokens if e in statistics else 0})" for e in starved)
        notes = (*notes, f"experts that fewer than {STARVED} tokens reached: {counts}")
    Q = Quantized.concatenate([layer.stored(work.scale_dtype) for layer in layers])
    errors = [layer.error() for layer in layers]
    return Finished(weight, Q, work.steps[-1][0], sum(errors) / len(errors), time.perf_counter() - start, notes)


def _steps(layer: Layer, grid: Grid, work: Work) -> Layer:
    for _, step in work.steps:
        layer = step(layer, grid, work.scale_dtype)
    return layer

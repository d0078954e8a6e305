"""Compress one block: observe its inputs, apply the recipe's steps to its weights, put the result in their place."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method, kind
from ..model.blocks import Weight
from ..tensors.grid import Grid
from ..tensors.layer import Layer, Quantized
from .activations import Stream
from .observe import Group, Statistics, discover, observe, record_original, token_ranges
from .portions import ROOM, portions
from .rounding import Reading, Rounded, Rounding, measured
from .streaming import Passage

STARVED = 64  # an expert that fewer calibration tokens reached is reported


@dataclass(frozen=True)
class Finished:
    """A weight that is done.  Q holds all experts' rows one after the other; trail as `Layer` has it."""

    weight: Weight
    Q: Quantized
    method: str
    error: float | None
    seconds: float
    notes: tuple[str, ...]
    trail: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Work:
    """What is to be done with one block: a grid for every weight that is not kept, and the steps in order, those for
    each weight and those for the block when all its weights are finished.

    readings: how the inputs of these weights are rounded when they run.  scales: what those are divided by first, as
    steps for the whole block decided; notes: what these had to say.  free: whether the checkpoint's format can say all
    of this, not only symmetric grids.  room: bytes of statistics that are held together.
    """

    grids: Mapping[Weight, Grid]
    steps: Sequence[tuple[str, Method]]
    scale_dtype: torch.dtype
    readings: Mapping[Weight, Reading] = field(default_factory=dict)
    scales: Mapping[Weight, Tensor] = field(default_factory=dict)
    notes: Mapping[Weight, tuple[str, ...]] = field(default_factory=dict)
    free: bool = True
    room: int = ROOM
    final_steps: Sequence[tuple[str, Any]] = ()

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
    rounding: Rounding,
    original: tuple[Stream, Stream] | None = None,
) -> Iterator[Finished]:
    """Finish the weights of one block, one after the other; afterwards the block runs with the finished ones.

    masters: the weights as trained, and as steps for the whole block rewrote them, float32 [out, in] or
    [experts, out, in].  passage: the calibration stream, None where no step looks at inputs.  rounding: takes the
    hooks that round the block's inputs from here on.  original: the original model's hidden states before this block,
    and where those after it are to be written.
    """
    weights = [w for w in masters if w in work.grids]
    groups = discover(block, passage, index, weights) if passage is not None else []
    inputs: dict[str, Stream] = {}
    if passage is not None and original is not None:
        inputs = record_original(block, passage, index, groups if work.needs_original else [], *original)
    reached = {member for group in groups for member in group.members}
    stages = [[group] for group in groups] if work.sequential else [groups]
    for i, stage in enumerate(stages):
        if i and passage is not None and passage.outputs is not None:
            passage.outputs.keep([weight for later in stages[i:] for group in later for weight in group.members])
        yield from _stage(block, masters, work, passage, index, rounding, stage, inputs)
    note = ("never reached in calibration",) if passage is not None else ()
    for weight in weights:
        if weight not in reached:
            unseen = Group(weight.module, (weight,))
            notes = _read(block, None, index, [unseen], work, rounding)
            for done in _finish((weight,), masters, work, None, (*note, *notes.get(weight.module, ()))):
                done = _as_read(done, work, rounding)
                _put(block, done)
                yield done


def _stage(
    block: nn.Module,
    masters: Mapping[Weight, Tensor],
    work: Work,
    passage: Passage | None,
    index: int,
    rounding: Rounding,
    stage: Sequence[Group],
    inputs: dict[str, Stream],
) -> Iterator[Finished]:
    """The weights of groups that are all observed in front of the finished ones, in as many portions as it takes."""
    notes = _read(block, passage, index, stage, work, rounding)
    waiting: list[Finished] = []  # until all of the stage has been seen
    experts = {g: _Experts(g.members[0], work, notes.get(g.leader, ())) for g in stage if g.is_experts}
    todo = list(portions(block, stage, work.room, inputs))
    for portion in todo:
        assert passage is not None, "without text nothing is reached"
        seen = observe(block, passage, index, list(portion), inputs, portion)
        last = portion is todo[-1]
        while last and waiting:
            _put(block, waiting.pop())
        for group, some in portion.items():
            if group in experts:
                for expert in some:
                    experts[group].add(masters[group.members[0]][expert], seen.pop((group, expert), None))
                complete = some.stop == len(masters[group.members[0]])
                finished: Iterable[Finished] = [experts[group].finished()] if complete else []
            else:
                said = notes.get(group.leader, ())
                finished = _finish(group.members, masters, work, seen.pop((group, 0), None), said)
            for done in finished:
                done = _as_read(done, work, rounding)
                _put(block, done) if last else waiting.append(done)
                yield done
            if group.leader in inputs:
                inputs.pop(group.leader).delete()


def _put(block: nn.Module, done: Finished) -> None:
    """Have the block run with a finished weight; experts one by one, as all of them in float32 are large."""
    experts = done.weight.experts(block)
    if done.weight.kind != "experts":
        done.weight.put(block, done.Q.dequantize())
        return
    rows, p = done.Q.shape[0] // experts, block.get_parameter(done.weight.name)
    for expert in range(experts):
        p.data[expert].copy_(done.Q.rows(slice(expert * rows, (expert + 1) * rows)).dequantize())


def _read(
    block: nn.Module, passage: Passage | None, index: int, groups: Sequence[Group], work: Work, rounding: Rounding
) -> dict[str, tuple[str, ...]]:
    """From here on the layers of these groups read what they will at run time.  Returns notes by leader."""
    readings = {w: work.readings[w] for group in groups for w in group.members if w in work.readings}
    looking = [g for g in groups if any(w in readings and readings[w].needs_ranges for w in g.members)]
    looking = [g for g in looking if not (g.is_experts and g.members[0].name.endswith("down_proj"))]  # read inside
    ranges = token_ranges(block, passage, index, looking, work.scales) if passage is not None and looking else {}
    notes: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for weight in group.members:
            scale = work.scales.get(weight)
            if weight not in readings:
                rounding.put({weight: Rounded(scale)})
                continue
            rounded, note = measured(readings[weight], scale, ranges.get(group), work.free)
            rounding.put({weight: rounded})
            if note is not None:
                notes[group.leader] = (note,)
    return notes


def _as_read(done: Finished, work: Work, rounding: Rounding) -> Finished:
    """With what is stored beside a weight because of its input."""
    notes = (*done.notes, *work.notes.get(done.weight, ()))
    return replace(done, Q=rounding.of[done.weight].on(done.Q), notes=notes)


def _divided(H: Tensor | None, s: Tensor | None) -> Tensor | None:
    """Σ x xᵀ of inputs divided by s."""
    return H if H is None or s is None else H / torch.outer(s, s)


def _finish(
    members: Sequence[Weight],
    masters: Mapping[Weight, Tensor],
    work: Work,
    seen: Statistics | None,
    notes: tuple[str, ...] = (),
) -> Iterator[Finished]:
    """Weights that read the same input; or experts that none reached."""
    if members[0].kind == "experts":
        experts = _Experts(members[0], work, notes)
        for W in masters[members[0]]:
            experts.add(W, None)
        yield experts.finished()
        return
    # Rows do not influence each other: weights that share H and grid go through the steps as one tall matrix, up to
    # the first step for which they do.
    by_grid: dict[Grid, list[Weight]] = {}
    for member in members:
        by_grid.setdefault(work.grids[member], []).append(member)
    H, C = (seen.H, seen.C) if seen is not None else (None, None)
    H, C = (_divided(t, work.scales.get(members[0])) for t in (H, C))
    for grid, same in by_grid.items():
        start = time.perf_counter()
        tall = Layer(name=same[0].name, W=torch.cat([masters[w].float() for w in same]), H=H, C=C, notes=notes)
        apart = next((i for i, (_, step) in enumerate(work.steps) if not getattr(step, "rowwise", True)), None)
        states = _steps([tall], work.steps[:apart], grid, work.scale_dtype)
        seconds, at = time.perf_counter() - start, 0
        for weight in same:
            rows, begun = slice(at, at := at + masters[weight].shape[0]), time.perf_counter()
            own = [replace(state.rows(rows), name=weight.name) for state in states]
            own = own if apart is None else _steps(own, work.steps[apart:], grid, work.scale_dtype)
            layer = _with_trail(own, work.steps)
            share = seconds * layer.W.shape[0] / tall.W.shape[0] + time.perf_counter() - begun
            yield _finished(weight, layer, work, share)


def _finished(weight: Weight, layer: Layer, work: Work, seconds: float) -> Finished:
    Q, error = layer.stored(work.scale_dtype), layer.trail[-1][1]
    return Finished(weight, Q, work.steps[-1][0], error, seconds, layer.notes, layer.trail)


class _Experts:
    """The experts of one tensor, finished one by one.  Of each is kept what will be stored, nothing in float32."""

    def __init__(self, weight: Weight, work: Work, notes: tuple[str, ...]) -> None:
        self.weight, self.work, self.notes = weight, work, notes
        self.steps = [(name, step) for name, step in work.steps if getattr(step, "experts", True)]
        if without := [name for name, step in work.steps if not getattr(step, "experts", True)]:
            self.notes = (*notes, f"fused experts go without {' and '.join(without)}")
        self.stored: list[Quantized] = []
        self.trails: list[tuple[tuple[str, float], ...]] = []
        self.tokens: list[int] = []
        self.seconds = 0.0

    def add(self, W: Tensor, seen: Statistics | None) -> None:
        """The next one.  W [out, in]; seen: of the tokens that reached it, None if none did."""
        start = time.perf_counter()
        name = f"{self.weight.name}[{len(self.stored)}]"
        layer = Layer(name=name, W=W.float(), H=None if seen is None else seen.H)
        states = _steps([layer], self.steps, self.work.grids[self.weight], self.work.scale_dtype)
        layer = _with_trail(states, self.steps)
        self.stored.append(layer.stored(self.work.scale_dtype))
        self.trails.append(layer.trail)
        self.tokens.append(0 if seen is None else seen.tokens)
        self.seconds += time.perf_counter() - start

    def finished(self) -> Finished:
        starved = ", ".join(f"{expert} ({n})" for expert, n in enumerate(self.tokens) if n < STARVED)
        notes = self.notes
        if any(self.tokens) and starved:
            notes = (*notes, f"experts that fewer than {STARVED} tokens reached: {starved}")
        Q = Quantized.concatenate(self.stored)
        trail = tuple((name, fmean(own[i][1] for own in self.trails)) for i, (name, _) in enumerate(self.steps))
        return Finished(self.weight, Q, self.steps[-1][0], trail[-1][1], self.seconds, notes, trail)


def _steps(
    states: list[Layer], steps: Sequence[tuple[str, Method]], grid: Grid, scale_dtype: torch.dtype
) -> list[Layer]:
    """The layer as it was before and after every step: `states` and one more for each of these steps."""
    for name, step in steps:
        skipped = grid.is_float and kind(name) == "quantize"
        states = [*states, states[-1] if skipped else step(states[-1], grid, scale_dtype)]
    return states


def _with_trail(states: Sequence[Layer], steps: Sequence[tuple[str, Method]]) -> Layer:
    """The layer after the last step, with its error after each."""
    trail = tuple((name, state.error()) for (name, _), state in zip(steps, states[1:], strict=True))
    return replace(states[-1], trail=trail)

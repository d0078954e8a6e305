"""From the statistics of its inputs to a finished weight: the recipe's steps, here or by a crew."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..memory import trim
from ..methods import Method, kind
from ..model.blocks import Weight
from ..tensors.grid import Grid
from ..tensors.layer import Layer, Quantized
from .crew import ALONE, Crew
from .observe import Statistics
from .portions import ROOM
from .rounding import Reading

STARVED = 64  # an expert that fewer calibration tokens reached is reported
Steps = Sequence[tuple[str, Method]]


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
    of this, not only symmetric grids.  room: bytes of statistics that are held together.  crew: who does it.  ways: the
    steps of weights that do not go through all of them; weights with the same ones share the object.
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
    crew: Crew = ALONE
    ways: Mapping[Weight, Steps] = field(default_factory=dict)

    def steps_of(self, weight: Weight) -> Steps:
        return self.ways.get(weight, self.steps)

    @property
    def needs_hessian(self) -> bool:
        return any(step.needs_hessian for _, step in self.steps)

    @property
    def needs_original(self) -> bool:
        return any(getattr(step, "needs_original", False) for _, step in self.steps)

    @property
    def one_pass(self) -> bool:
        """Whether what the original model's layers read is all that is looked at."""
        looking = [step for _, step in self.steps if step.needs_hessian]
        return bool(looking) and all(getattr(step, "one_pass", False) for step in looking)

    @property
    def sequential(self) -> bool:
        return any(getattr(step, "true_sequential", False) for _, step in self.steps)


@dataclass(frozen=True)
class Solved:
    """What became of some rows of a weight.  errors: after every step.  energy: ‖WX‖², by which errors of parts add."""

    Q: Quantized
    errors: tuple[float, ...]
    energy: float
    notes: tuple[str, ...]
    seconds: float


def finish(
    members: Sequence[Weight],
    masters: Mapping[Weight, Tensor],
    work: Work,
    seen: Statistics | None,
    notes: tuple[str, ...] = (),
) -> Iterator[Finished]:
    """Weights that read the same input; or experts that none reached."""
    if members[0].kind == "experts":
        experts = Experts(members[0], work, notes)
        experts.add((W, None) for W in masters[members[0]])
        yield experts.finished()
        return
    alike: dict[tuple[Grid, int], list[Weight]] = {}
    for member in members:
        alike.setdefault((work.grids[member], id(work.steps_of(member))), []).append(member)
    H, C = seen.taken() if seen is not None else (None, None)
    H, C = (_divided(t, work.scales.get(members[0])) for t in (H, C))
    together = _tall if work.crew.parts == 1 else _in_parts
    trim()  # what the activations left
    for same in alike.values():
        yield from together(same, masters, work, H, C, notes)
    trim()


def _tall(
    same: Sequence[Weight], masters: Mapping[Weight, Tensor], work: Work,
    H: Tensor | None, C: Tensor | None, notes: tuple[str, ...],
) -> Iterator[Finished]:  # fmt: skip
    """Rows do not influence each other: weights that share H and grid go through the steps as one tall matrix, up to
    the first step for which they do."""
    start, grid, steps = time.perf_counter(), work.grids[same[0]], work.steps_of(same[0])
    tall = Layer(name=same[0].name, W=torch.cat([masters[w].float() for w in same]), H=H, C=C, notes=notes)
    apart = _apart(steps)
    states = _steps([tall], steps[:apart], grid, work.scale_dtype)
    seconds, at = time.perf_counter() - start, 0
    for weight in same:
        rows, begun = slice(at, at := at + masters[weight].shape[0]), time.perf_counter()
        own = [replace(state.rows(rows), name=weight.name) for state in states]
        own = own if apart is None else _steps(own, steps[apart:], grid, work.scale_dtype)
        layer = _with_trail(own, steps)
        share = seconds * layer.W.shape[0] / tall.W.shape[0] + time.perf_counter() - begun
        Q, error = layer.stored(work.scale_dtype), layer.trail[-1][1]
        yield Finished(weight, Q, steps[-1][0], error, share, layer.notes, layer.trail)


def _in_parts(
    same: Sequence[Weight], masters: Mapping[Weight, Tensor], work: Work,
    H: Tensor | None, C: Tensor | None, notes: tuple[str, ...],
) -> Iterator[Finished]:  # fmt: skip
    """The same in pieces, by a crew.  Where rows do influence each other, a piece is a whole weight."""
    grid, steps = work.grids[same[0]], work.steps_of(same[0])
    whole = _apart(steps) is not None
    rows = sum(masters[w].shape[0] for w in same)
    counts = [1 if whole else max(1, round(work.crew.parts * masters[w].shape[0] / rows)) for w in same]
    shared = work.crew.keep((steps, grid, work.scale_dtype))
    H, C = work.crew.keep(H), work.crew.keep(C)
    pieces = ((W, H, C, w.name, notes) for w, n in zip(same, counts, strict=True) for W in masters[w].chunk(n))
    solved = work.crew.each(_solve, shared, pieces)
    for weight, n in zip(same, counts, strict=True):
        own = [next(solved) for _ in masters[weight].chunk(n)]
        Q = own[0].Q if len(own) == 1 else Quantized.concatenate([piece.Q for piece in own])
        energy = sum(piece.energy for piece in own) or 1.0
        errors = [math.sqrt(sum(p.errors[i] ** 2 * p.energy for p in own) / energy) for i in range(len(steps))]
        trail = tuple((name, error) for (name, _), error in zip(steps, errors, strict=True))
        said = tuple(dict.fromkeys(note for piece in own for note in piece.notes))
        yield Finished(weight, Q, steps[-1][0], errors[-1], sum(piece.seconds for piece in own), said, trail)


def _solve(
    device: str, shared: tuple[Steps, Grid, torch.dtype], W: Tensor, H: Tensor | None, C: Tensor | None, name: str,
    notes: tuple[str, ...] = (),
) -> Solved:  # fmt: skip
    """A crew's job: rows W [rows, in] through the steps, on the processor, wherever blocks compute."""
    steps, grid, scale_dtype = shared
    start = time.perf_counter()
    first = Layer(name=name, W=W.float(), H=H, C=C, notes=notes)
    layer = _with_trail(_steps([first], steps, grid, scale_dtype), steps)
    errors = tuple(error for _, error in layer.trail)
    return Solved(layer.stored(scale_dtype), errors, first.energy, layer.notes, time.perf_counter() - start)


class Experts:
    """The experts of one tensor, finished one by one.  Of each is kept what will be stored, nothing in float32."""

    def __init__(self, weight: Weight, work: Work, notes: tuple[str, ...]) -> None:
        self.weight, self.work, self.notes = weight, work, notes
        own = work.steps_of(weight)
        self.steps = [(name, step) for name, step in own if getattr(step, "experts", True)]
        if without := [name for name, step in own if not getattr(step, "experts", True)]:
            self.notes = (*notes, f"fused experts go without {' and '.join(without)}")
        self.solved: list[Solved] = []
        self.tokens: list[int] = []

    def add(self, some: Iterable[tuple[Tensor, Statistics | None]]) -> None:
        """The next ones: W [out, in], and what was seen of the tokens that reached it, None if none did."""
        crew = self.work.crew
        shared = crew.keep((self.steps, self.work.grids[self.weight], self.work.scale_dtype))
        self.solved += crew.each(_solve, shared, (self._part(W, seen) for W, seen in some))

    def _part(self, W: Tensor, seen: Statistics | None) -> tuple[Any, ...]:
        self.tokens.append(0 if seen is None else seen.tokens)
        name = f"{self.weight.name}[{len(self.tokens) - 1}]"
        return W, None if seen is None else seen.H, None, name

    def finished(self) -> Finished:
        starved = ", ".join(f"{expert} ({n})" for expert, n in enumerate(self.tokens) if n < STARVED)
        notes = self.notes
        if any(self.tokens) and starved:
            notes = (*notes, f"experts that fewer than {STARVED} tokens reached: {starved}")
        Q = Quantized.concatenate([expert.Q for expert in self.solved])
        trail = tuple((name, fmean(e.errors[i] for e in self.solved)) for i, (name, _) in enumerate(self.steps))
        seconds = sum(expert.seconds for expert in self.solved)
        return Finished(self.weight, Q, self.steps[-1][0], trail[-1][1], seconds, notes, trail)


def _apart(steps: Steps) -> int | None:
    """The first step for which the rows of a weight influence each other."""
    return next((i for i, (_, step) in enumerate(steps) if not getattr(step, "rowwise", True)), None)


def _divided(H: Tensor | None, s: Tensor | None) -> Tensor | None:
    """Σ x xᵀ of inputs divided by s."""
    return H if H is None or s is None else H / torch.outer(s, s)


def _steps(states: list[Layer], steps: Steps, grid: Grid, scale_dtype: torch.dtype) -> list[Layer]:
    """The layer as it was before and after every step: `states` and one more for each of these steps."""
    for name, step in steps:
        skipped = grid.is_float and kind(name) == "quantize"
        states = [*states, states[-1] if skipped else step(states[-1], grid, scale_dtype)]
    return states


def _with_trail(states: Sequence[Layer], steps: Steps) -> Layer:
    """The layer after the last step, with its error after each."""
    trail = tuple((name, state.error()) for (name, _), state in zip(steps, states[1:], strict=True))
    return replace(states[-1], trail=trail)

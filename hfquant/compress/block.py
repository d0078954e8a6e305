"""Compress one block: observe its inputs, apply the recipe's steps to its weights, put the result in their place."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import Weight
from .activations import Stream
from .observe import Group, discover
from .portions import portions
from .rounding import Rounded, Rounding, measured
from .solve import Experts, Finished, Work, finish
from .streaming import Passage
from .together import observe, record_original, token_ranges


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
    inputs: dict[str, Any] = {}
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
            for done in finish((weight,), masters, work, None, (*note, *notes.get(weight.module, ()))):
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
    inputs: dict[str, Any],
) -> Iterator[Finished]:
    """The weights of groups that are all observed in front of the finished ones, in as many portions as it takes."""
    notes = _read(block, passage, index, stage, work, rounding)
    waiting: list[Finished] = []  # until all of the stage has been seen
    experts = {g: Experts(g.members[0], work, notes.get(g.leader, ())) for g in stage if g.is_experts}
    todo = list(portions(block, stage, work.room, inputs))
    for portion in todo:
        assert passage is not None, "without text nothing is reached"
        further = work.one_pass and portion is todo[0]  # the untouched block's outputs are what the next one sees
        seen = observe(block, passage, index, list(portion), inputs, portion, further)
        last = portion is todo[-1]
        while last and waiting:
            _put(block, waiting.pop())
        for group, some in portion.items():
            if group in experts:
                W = masters[group.members[0]]
                experts[group].add((W[expert], seen.pop((group, expert), None)) for expert in some)
                complete = some.stop == len(W)
                finished: Iterable[Finished] = [experts[group].finished()] if complete else []
            else:
                said = notes.get(group.leader, ())
                finished = finish(group.members, masters, work, seen.pop((group, 0), None), said)
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

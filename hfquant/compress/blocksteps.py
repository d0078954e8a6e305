"""Steps that rewrite a whole block before its weights are compressed one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import Weight
from ..recipe import Recipe, Step
from .rounding import Reading
from .selection import Target, placed
from .solve import Work
from .streaming import Passage
from .view import BlockView, Prepared


def in_scope(steps: Sequence[Step], scope: str) -> list[tuple[str, Any]]:
    """The steps, ready to be called, that are for whole blocks ("block"), for one weight ("linear"), or for blocks
    whose weights are all compressed ("finished")."""
    built = [(step.method, step.build()) for step in steps]
    return [(name, step) for name, step in built if getattr(step, "scope", "linear") == scope]


def ways(targets: Mapping[Weight, Target], recipe: Recipe) -> dict[Weight, Sequence[tuple[str, Any]]]:
    """The steps for one weight that each of these targets goes through, where some steps are not for all."""
    if not any(step.only for step in recipe.steps):
        return {}
    built: dict[tuple[int, ...], Sequence[tuple[str, Any]]] = {}
    found = {}
    for weight, target in targets.items():
        own = recipe.steps_of(target.layer, target.place)
        key = tuple(map(id, own))
        if key not in built:
            built[key] = placed_steps(in_scope(own, "linear"), targets)
        found[weight] = built[key]
    return found


def placed_steps(steps: Sequence[tuple[str, Any]], targets: Mapping[Weight, Target]) -> list[tuple[str, Any]]:
    """The steps for single weights as they are for those of one block, which they know by their names within it."""
    names = {weight.name: target for weight, target in targets.items()}
    return [(name, placed(step, names)) for name, step in steps]


@torch.no_grad()
def prepare(
    block: nn.Module,
    steps: Sequence[tuple[str, Any]],
    work: Work,
    passage: Passage | None,
    index: int,
    stored: torch.dtype,
    device: str = "cpu",
) -> tuple[dict[Weight, Tensor], Work, Prepared]:
    """Run the block steps on a block whose parameters are float32, and stay so.

    stored: the type in which parameters that are not compressed will be written.  Returns the weights to compress,
    float32, some of them the block's own parameters; the work, with what the steps decided; and what else they
    changed.  A block that no text reaches stays as it is.
    """
    prepared = Prepared()
    if steps and passage is not None:
        own = {p: p.data for p in block.parameters()}
        for p, data in own.items():
            p.data = data.to(device)
        view = BlockView(block, passage, index, work.grids, work.readings, work.scale_dtype, stored, work.free)
        for _, step in steps:
            step(view)
        prepared = view.finish()
        for p, data in own.items():
            data.copy_(p.data)
            p.data = data
    masters = {weight: weight.get(block) for weight in work.grids}
    masters |= {weight: masters[weight] * s for weight, s in prepared.scales.items()}
    return masters, replace(work, scales=prepared.scales, notes=prepared.notes), prepared


def readings(targets: Mapping[Weight, Any], recipe: Recipe) -> dict[Weight, Reading]:
    """How the inputs of these targets are rounded, of those where they are."""
    wanted = Reading.of(getattr(recipe, "activations", None))
    return {} if wanted is None else {w: wanted for w, target in targets.items() if target.activations is not None}

"""Which statistics are gathered in one run through a block: those of all its inputs together may not fit in memory."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..recipe import Recipe
from .observe import Group

if TYPE_CHECKING:
    from .layout import LayerPlan

ROOM = 1 << 30  # bytes of statistics that are held together, unless the plan says otherwise


def nbytes(in_features: int, beside: bool = False) -> int:
    """Of the sums over one input; beside: with those that compare it to the original model's."""
    return 4 * in_features**2 * (2 if beside else 1)


def portions(
    block: nn.Module, groups: Sequence[Group], room: int, beside: Collection[str] = ()
) -> Iterator[dict[Group, range]]:
    """The groups in order, cut so that each portion's statistics fit into `room` bytes, or are of one input alone.

    Yields the groups of a portion, with the experts that are meant (0 for ordinary layers).  beside: leaders whose
    inputs are compared with the original model's.
    """
    portion: dict[Group, range] = {}
    used = 0
    for group in groups:
        weight = group.members[0]
        each = nbytes(weight.shape(block)[1], group.leader in beside)
        for expert in range(weight.experts(block)):
            if portion and used + each > room:
                yield portion
                portion, used = {}, 0
            begun = portion.get(group, range(expert, expert))
            portion[group] = range(begun.start, expert + 1)
            used += each
    if portion:
        yield portion


@dataclass(frozen=True)
class Held:
    """Bytes of a block's statistics.  total: of all that are observed in front of the same weights; largest: of one
    input; together: what is in memory at once, in a room of that size."""

    total: int
    largest: int
    together: int

    @property
    def runs(self) -> int:
        """How often the block runs to gather them, over what one would do."""
        return -(-self.total // max(1, self.together)) if self.total else 1


def held(recipe: Recipe, layers: "Sequence[LayerPlan]", itemsize: int, room: int) -> Held:
    """At most: layers that share an input are not known here, and each counts."""
    built = [step.build() for step in recipe.steps]
    sequential = any(getattr(step, "true_sequential", False) for step in built)
    beside = any(getattr(step, "needs_original", False) for step in built)
    stages: dict[object, int] = {}
    largest = 0
    for layer in layers:
        copies = layer.bytes_before // itemsize // (layer.shape[0] * layer.shape[1])
        each = nbytes(layer.shape[1], beside and layer.kind != "experts")
        stage = layer.name if sequential else layer.block
        stages[stage] = stages.get(stage, 0) + each * copies
        largest = max(largest, each)
    total = max(stages.values())
    return Held(total, largest, min(total, max(room, largest)))

"""Which statistics are gathered in one run through a block: those of all its inputs together may not fit in memory."""

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from .observe import Group

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

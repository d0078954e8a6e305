"""Which tensors stay in memory: whole ones, so that their sizes are exact, spread evenly over the layers."""

from collections.abc import Sequence

from .pieces import Piece, aligned, footprint


def choose(stages: Sequence[Sequence[Piece]], room: int) -> frozenset[str]:
    """Names of the pieces to keep within `room` bytes.

    What is left to read decides the time of a layer, so the largest tensor that fits is always taken from the layer
    that has most left.
    """
    left = [sorted(pieces, key=lambda p: (-p.nbytes, p.name)) for pieces in stages]
    sizes = [footprint(pieces) for pieces in stages]
    chosen: set[str] = set()
    open_stages = {i for i, pieces in enumerate(left) if pieces}
    while open_stages:
        stage = max(open_stages, key=lambda i: (sizes[i], -i))
        fits = next((p for p in left[stage] if aligned(p.nbytes) <= room), None)
        if fits is None:
            open_stages.discard(stage)
            continue
        left[stage].remove(fits)
        chosen.add(fits.name)
        room -= aligned(fits.nbytes)
        sizes[stage] -= aligned(fits.nbytes)
        if not left[stage]:
            open_stages.discard(stage)
    return frozenset(chosen)


def kept(stages: Sequence[Sequence[Piece]], resident: frozenset[str]) -> int:
    """Bytes of memory that the resident pieces take."""
    return sum(aligned(p.nbytes) for pieces in stages for p in pieces if p.name in resident)


def largest_streamed(stages: Sequence[Sequence[Piece]], resident: frozenset[str]) -> int:
    """Bytes of one buffer of the ring."""
    return max((footprint([p for p in pieces if p.name not in resident]) for pieces in stages), default=0)

"""Which tensors stay in memory: whole ones, so that their sizes are exact, spread evenly over the layers."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .pieces import Piece, aligned, footprint


@dataclass(frozen=True)
class Placed:
    """resident: names of the pieces that stay.  kept: bytes of memory they take.  read_once: bytes of the disk that
    are read for them.  per_stage: bytes of the disk that are read in every pass.  largest: bytes of one buffer of the
    ring.  busy: stages that are read at all."""

    resident: frozenset[str]
    kept: int
    read_once: int
    per_stage: tuple[int, ...]
    largest: int

    @property
    def streamed(self) -> int:
        return sum(self.per_stage)

    @property
    def busy(self) -> int:
        return sum(1 for nbytes in self.per_stage if nbytes)

    def streamed_again(self, skipped: int) -> int:
        """Without the first stages: an encoder runs in the first pass alone."""
        return sum(self.per_stage[skipped:])


class Placement:
    """What is placed where, for any room."""

    def __init__(self, stages: Sequence[Sequence[Piece]]) -> None:
        self.stages = [sorted(pieces, key=lambda p: (-p.nbytes, p.name)) for pieces in stages]
        self.total = sum(footprint(pieces) for pieces in stages)
        self.size = sum(p.size for pieces in stages for p in pieces)
        self.largest = max((footprint(pieces) for pieces in stages), default=0)
        self._placed = lru_cache(1024)(self._place)

    def __call__(self, room: int) -> Placed:
        """The pieces to keep within `room` bytes.

        What is left to read decides the time of a layer, so the largest tensor that fits is always taken from the layer
        that has most left.
        """
        return self._placed(min(max(room, 0), self.total))

    def _place(self, room: int) -> Placed:
        chosen: list[Piece] = []
        sizes = [footprint(pieces) for pieces in self.stages]
        left = [list(pieces) for pieces in self.stages]
        heap = [(-size, i) for i, size in enumerate(sizes)]
        heapq.heapify(heap)
        while heap:
            _, stage = heapq.heappop(heap)
            fits = next((k for k, p in enumerate(left[stage]) if aligned(p.nbytes) <= room), None)
            if fits is None:
                continue
            piece = left[stage].pop(fits)
            chosen.append(piece)
            room -= aligned(piece.nbytes)
            sizes[stage] -= aligned(piece.nbytes)
            heapq.heappush(heap, (-sizes[stage], stage))
        return Placed(
            frozenset(p.name for p in chosen),
            sum(aligned(p.nbytes) for p in chosen),
            sum(p.size for p in chosen),
            tuple(sum(p.size for p in pieces) for pieces in left),
            max(sizes, default=0),
        )

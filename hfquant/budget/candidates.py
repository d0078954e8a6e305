"""What may become of a weight, and the bytes that each of these takes in the files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compress import finish
from ..compress.layout import Layout
from ..compress.naming import names_of
from ..compress.selection import Target, expected
from ..methods import lorc, sparsegpt
from ..methods._mask import Places
from ..model.skeleton import Skeleton
from ..recipe import GridSpec, Recipe
from ..recipe_budget import Budget, Share
from ..recipe_places import matches
from ..tensors import formats
from ..tensors.encoding import Encoding
from ..tensors.grid import Grid
from ..tensors.shards import DTYPES, METADATA, nbytes
from .table import Option

FORMAT = "native"  # the only one that mixes grids
ENDS = ("embedding", "head")
# of what is left of a pruned weight: finer grids cost more than the weights that they could keep
SPARSE_BITS = (3, 4, 5)
RANK_BITS = 4  # beside finer grids than that a correction is never worth its bytes
# up to these a zero point may be worth its bits, or they be better spent on smaller groups; for a small model, finer
# grids were never chosen with one
ASYMMETRIC_BITS = 4


@dataclass(frozen=True)
class Candidate:
    """A grid for a weight; None: it stays as it is.  sparsity: what is pruned before, a share or a pattern.  rank: of
    the correction beside it."""

    grid: GridSpec | None
    sparsity: Share | None = None
    rank: int = 0

    @classmethod
    def of(cls, grid: Grid) -> "Candidate":
        return cls(GridSpec(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric))

    @property
    def pruning(self) -> sparsegpt.Method | None:
        if self.sparsity is None:
            return None
        return sparsegpt.Method(**{"pattern" if isinstance(self.sparsity, str) else "sparsity": self.sparsity})

    @property
    def places(self) -> Places:
        """Which weights are pruned."""
        assert self.pruning is not None
        return self.pruning.places("")

    @property
    def methods(self) -> list[Any]:
        """What it goes through beside rounding."""
        correction = lorc.Method(rank=self.rank) if self.rank else None
        return [method for method in (self.pruning, correction) if method is not None]

    def encoding(self, target: Target, recipe: Recipe) -> Encoding:
        """How a target that becomes this is stored.  The recipe has no steps that prune or compensate."""
        assert self.grid is not None
        encoding = expected(replace(target, grid=self.grid.grid()), recipe)
        for method in self.methods:
            encoding = method.encodes(encoding, target.shape)
        return encoding

    def fits(self, target: Target, recipe: Recipe) -> bool:
        """Whether a target can become this."""
        if target.kind == "experts" and not all(getattr(method, "experts", True) for method in self.methods):
            return False
        if self.rank >= min(target.shape):
            return False
        refused = formats.load(FORMAT).refuses(self.encoding(target, recipe), target.shape, target.kind)
        return refused is None


def candidates(target: Target, recipe: Recipe, budget: Budget) -> list[Candidate]:
    """For one weight, from few bits to many.  What the recipe itself gives a grid, by an override or by its
    `embeddings` where a budget leaves these alone, has no choice."""
    ends = target.kind in ENDS and not budget.with_ends
    if ends or pinned(target, recipe):
        return [Candidate.of(target.grid)]
    groups = distinct(budget.groups, target.shape[1])
    grids = [
        GridSpec(bits=bits, group_size=group, symmetric=symmetric)
        for bits in budget.bits
        for group in groups
        for symmetric in ((True, False) if bits <= ASYMMETRIC_BITS else (True,))
    ]
    found = [Candidate(grid) for grid in grids]
    if target.kind not in ENDS:
        found += [one for one in _beyond_grids(grids, budget) if one.fits(target, recipe)]
    return [*found, Candidate(None)]


def _beyond_grids(grids: Sequence[GridSpec], budget: Budget) -> Iterator[Candidate]:
    """What is pruned keeps the largest groups: its scales weigh twice as much beside what is left."""
    grids = [grid for grid in grids if grid.symmetric]
    large = [grid for grid in grids if grid.bits in SPARSE_BITS and grid.group_size == grids[-1].group_size]
    for sparsity in budget.sparsity:
        yield from (Candidate(grid, sparsity, rank) for grid in large for rank in (0, *budget.ranks))
    yield from (Candidate(grid, None, rank) for grid in grids if grid.bits <= RANK_BITS for rank in budget.ranks)


def pinned(target: Target, recipe: Recipe) -> bool:
    """Whether the recipe itself says what becomes of a weight."""
    return any(matches(glob, target.layer, target.place) for glob in recipe.overrides)


def distinct(groups: Sequence[int], in_features: int) -> list[int]:
    """The group sizes that differ for rows of this length, from small to large."""
    found: dict[int, int] = {}
    for group in sorted(groups, key=lambda g: in_features if g == -1 else g):
        found.setdefault(in_features if group == -1 else min(group, in_features), group)
    return list(found.values())


class Bytes:
    """What tensors take in the weight files, headers included, of a model that is laid out.

    Never less than it will be: offsets are counted with the digits of the largest.
    """

    def __init__(self, laid: Layout, recipe: Recipe) -> None:
        self.laid, self.recipe = laid, recipe
        self.fmt = formats.load(FORMAT)
        self.skeleton: Skeleton = laid.skeleton
        self.digits = len(str(2 * self.skeleton.source.total_bytes))
        # float32 scales only where an embedding comes first, see `compress.selection.wire_for`
        embedded = any(target.kind == "embedding" for target in laid.targets.values())
        halved = laid.dtype == torch.float32 and not embedded
        self.scale_dtype = torch.float16 if halved else laid.dtype

    def option(self, target: Target, candidate: Candidate, loss: float = 0.0) -> Option:
        """The candidate with its bytes."""
        nbytes, data = self.of(target, candidate)
        return Option(candidate.grid, nbytes, data, loss, sparsity=candidate.sparsity, rank=candidate.rank)

    def of(self, target: Target, candidate: Candidate) -> tuple[int, int]:
        """With and without the header."""
        if candidate.grid is None:
            tensors = {name: self._kept(name) for name in self._replaced(target.parameter)}
        else:
            tensors = self.components(target, candidate)
        return self._of(tensors), sum(nbytes(shape, dtype) for shape, dtype in tensors.values())

    def components(self, target: Target, candidate: Candidate) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored name -> (shape, type) of a weight on a grid."""
        encoding = candidate.encoding(target, self.recipe)
        copies = self.skeleton.model.get_parameter(target.parameter).shape[0] if target.kind == "experts" else 1
        spec = self.fmt.spec(encoding, target.shape, self.scale_dtype)
        parts: dict[str, Tensor] = {
            component: torch.empty(copies * shape[0], *shape[1:], dtype=dtype, device="meta")
            for component, (shape, dtype) in spec.items()
        }
        named = names_of(self.skeleton, self.fmt, target.parameter, target.kind, parts, target.shape[1])
        return {name: (tuple(t.shape), t.dtype) for name, t in named.items()}

    def rest(self) -> int:
        """All that is not chosen for, and the frame of the file."""
        chosen = {stored for name in self.laid.targets for stored in self._replaced(name)}
        others = {name: self._kept(name) for name in self.skeleton.source.tensors if name not in chosen}
        return self._of(others) + self._files() * (len(json.dumps(METADATA)) + 40)

    def _files(self) -> int:
        """At most: of two files that follow each other, one is at least half full."""
        total = self.original()
        return 1 if total <= finish.MAX_SHARD else 1 + 2 * total // finish.MAX_SHARD

    def original(self) -> int:
        """Everything as it is, in the type that the result is stored in."""
        return self._of({name: self._kept(name) for name in self.skeleton.source.tensors})

    def _replaced(self, parameter: str) -> Iterator[str]:
        """What the source stores of a parameter: of tied ones, maybe twice."""
        tied: Mapping[str, str] = getattr(self.skeleton.model, "all_tied_weights_keys", {})
        for name in (parameter, *(borrower for borrower, owner in tied.items() if owner == parameter)):
            yield from self.skeleton.stored.get(name, ())

    def _kept(self, stored: str) -> tuple[tuple[int, ...], torch.dtype]:
        info = self.skeleton.source.tensors[stored]
        return info.shape, self.laid.dtype if info.dtype == self.skeleton.source.dtype else info.dtype

    def _of(self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
        return sum(nbytes(shape, dtype) + self._header(name, shape, dtype) for name, (shape, dtype) in tensors.items())

    def _header(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Characters of one tensor's entry."""
        said = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, 0]}
        text = json.dumps({name: said}, separators=(",", ":"), ensure_ascii=False)
        return len(text.encode()) - 1 + 2 * (self.digits - 1)

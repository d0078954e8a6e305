"""What may become of a weight, and the bytes that each of these takes in the files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compress import finish
from ..compress.layout import Layout
from ..compress.naming import names_of
from ..compress.selection import Target, expected
from ..model.skeleton import Skeleton
from ..recipe import GridSpec, Recipe
from ..recipe_budget import Budget
from ..recipe_places import matches
from ..tensors import formats
from ..tensors.grid import Grid
from ..tensors.shards import DTYPES, METADATA, nbytes

FORMAT = "native"  # the only one that mixes grids
KEPT = "kept"
ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Candidate:
    """A grid for a weight; None: it stays as it is."""

    grid: GridSpec | None

    @classmethod
    def of(cls, grid: Grid) -> "Candidate":
        return cls(GridSpec(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric))

    def __str__(self) -> str:
        return KEPT if self.grid is None else str(self.grid.grid())


def candidates(target: Target, recipe: Recipe, budget: Budget) -> list[Candidate]:
    """For one weight, from few bits to many.  What the recipe itself gives a grid, by an override or by its
    `embeddings` where a budget leaves these alone, has no choice."""
    ends = target.kind in ENDS and not budget.with_ends
    if ends or pinned(target, recipe):
        return [Candidate.of(target.grid)]
    groups = distinct(budget.groups, target.shape[1])
    grids = [
        GridSpec(bits=bits, group_size=group, symmetric=bits in (4, 8)) for bits in budget.bits for group in groups
    ]
    return [Candidate(grid) for grid in grids] + [Candidate(None)]


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

    def of(self, target: Target, candidate: Candidate) -> tuple[int, int]:
        """With and without the header."""
        if candidate.grid is None:
            tensors = {name: self._kept(name) for name in self._replaced(target.parameter)}
        else:
            tensors = self.components(target, candidate.grid)
        return self._of(tensors), sum(nbytes(shape, dtype) for shape, dtype in tensors.values())

    def components(self, target: Target, grid: GridSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored name -> (shape, type) of a weight on a grid."""
        encoding = expected(_on(target, grid), self.recipe)
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


def _on(target: Target, grid: GridSpec) -> Target:
    return replace(target, grid=grid.grid())

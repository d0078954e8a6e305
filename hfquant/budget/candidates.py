"""What may become of a weight, and the bytes that each of these takes in the files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compress.layout import Layout
from ..compress.naming import names_of
from ..compress.selection import Target, expected
from ..model.skeleton import Skeleton
from ..recipe import GridSpec, Recipe
from ..recipe_budget import Budget
from ..tensors import formats
from ..tensors.shards import DTYPES, METADATA, layout, nbytes

FORMAT = "native"  # the only one that mixes grids
KEPT = "kept"


@dataclass(frozen=True)
class Candidate:
    """A grid for a weight; None: it stays as it is."""

    grid: GridSpec | None

    def __str__(self) -> str:
        return KEPT if self.grid is None else str(self.grid.grid())


def candidates(target: Target, recipe: Recipe, budget: Budget) -> list[Candidate]:
    """For one weight, from few bits to many.  What an override of the recipe gives a grid has no choice."""
    if pinned(target, recipe):
        grid = target.grid
        return [Candidate(GridSpec(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric))]
    groups = distinct(budget.groups, target.shape[1])
    grids = [
        GridSpec(bits=bits, group_size=group, symmetric=bits in (4, 8)) for bits in budget.bits for group in groups
    ]
    return [Candidate(grid) for grid in grids] + [Candidate(None)]


def pinned(target: Target, recipe: Recipe) -> bool:
    """Whether the recipe itself says what becomes of a weight."""
    from ..recipe_places import matches

    return any(not glob.startswith("@") and matches(glob, target.layer, None) for glob in recipe.overrides)


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

    def __init__(self, laid: Layout, recipe: Recipe, budget: Budget) -> None:
        self.laid, self.recipe = laid, recipe
        self.fmt = formats.load(FORMAT)
        self.skeleton: Skeleton = laid.skeleton
        self.digits = len(str(2 * self.skeleton.source.total_bytes))
        # float32 scales only where an embedding comes first, see `compress.selection.wire_for`
        halved = laid.dtype == torch.float32 and not budget.with_ends
        self.scale_dtype = torch.float16 if halved else laid.dtype

    def of(self, target: Target, candidate: Candidate) -> int:
        if candidate.grid is None:
            return self._of({name: self._kept(name) for name in self.skeleton.stored[target.parameter]})
        return self._of(self.components(target, candidate.grid))

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
        return self._of(others) + len(json.dumps(METADATA)) + 40

    def original(self) -> int:
        """Everything as it is, in the type that the result is stored in."""
        return self._of({name: self._kept(name) for name in self.skeleton.source.tensors})

    def _replaced(self, parameter: str) -> Iterator[str]:
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
    from dataclasses import replace

    return replace(target, grid=grid.grid())


def exact(laid: Layout) -> int:
    """The size of the weight file of a model that is laid out, as long as it is one file."""
    skeleton, fmt = laid.skeleton, formats.load(laid.wire.format)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    replaced: set[str] = set()
    tied: Mapping[str, str] = getattr(skeleton.model, "all_tied_weights_keys", {})
    for name, target in laid.targets.items():
        copies = skeleton.model.get_parameter(name).shape[0] if target.kind == "experts" else 1
        spec = fmt.spec(laid.wire.layers[target.layer], target.shape, laid.wire.scale_dtype)
        parts = {c: torch.empty(copies * s[0], *s[1:], dtype=d, device="meta") for c, (s, d) in spec.items()}
        named = names_of(skeleton, fmt, name, target.kind, parts, target.shape[1])
        tensors |= {stored: (tuple(t.shape), t.dtype) for stored, t in named.items()}
        owned = (name, *(borrower for borrower, owner in tied.items() if owner == name))
        replaced |= {stored for one in owned for stored in skeleton.stored.get(one, ())}
    for stored, info in skeleton.source.tensors.items():
        if stored not in replaced:
            tensors[stored] = info.shape, laid.dtype if info.dtype == skeleton.source.dtype else info.dtype
    return layout(tensors, METADATA)[2]

"""A weight in tiles, and how x must be prepared for it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ...tensors.activations import bounds
from ...tensors.encoding import Activations
from ...tensors.grid import Grid
from ...tensors.layer import Quantized
from .. import integers
from . import engine
from .codes import Tile
from .machine import Level
from .packing import Pack
from .records import BLOCK, ROWS, Inputs, Weight

GROUP = 64  # columns of x that share a scale, where nothing else says so
WASTE = 2.0  # times as many columns as there are, at most, after padding


@dataclass(frozen=True)
class Runs:
    """The columns of a weight in runs that share one scale of the weight and one of x.

    spans: first column and the one after the last, of every run.  length: of each in tiles.  scale_of: the weight's group
    of every scale that is stored, one for `per_scale` runs.  first: the first run of every group of x, and the end.
    """

    spans: tuple[tuple[int, int], ...]
    length: int
    scale_of: tuple[int, ...]
    per_scale: int
    first: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Columns in tiles."""
        return len(self.spans) * self.length

    @classmethod
    def of(cls, in_features: int, weight_columns: int, x_columns: int) -> "Runs":
        """Of groups of the weight and groups of x, by their columns."""
        spans = tuple(integers.spans(in_features, weight_columns, x_columns))
        owners = [a // weight_columns for a, _ in spans]
        sizes = [len(list(group)) for _, group in groupby(owners)]
        per_scale = sizes[0] if all(n == sizes[0] for n in sizes[:-1]) and sizes[-1] <= sizes[0] else 1
        first = [i for i, (a, _) in enumerate(spans) if a % x_columns == 0]
        longest = max(b - a for a, b in spans)
        return cls(spans, -(-longest // BLOCK) * BLOCK, tuple(owners[::per_scale]), per_scale, (*first, len(spans)))


def input_group(in_features: int, weight_columns: int) -> int:
    """Columns of x that should share a scale, if the layer leaves it open: about `GROUP`, and a part of the weight's."""
    if weight_columns >= in_features:
        return min(GROUP, in_features)
    parts = [n for n in range(GROUP // 2, 2 * GROUP + 1) if weight_columns % n == 0]
    return min(parts, key=lambda n: (abs(n - GROUP), n)) if weight_columns > GROUP and parts else weight_columns


@dataclass(frozen=True)
class Preparation:
    """How x becomes what tiles are multiplied by.  Weights with equal ones can share what is prepared."""

    runs: Runs
    order: int
    activations: Activations | None  # None: x as it is
    columns: int

    @property
    def real(self) -> bool:
        return self.activations is None

    def record(self, table: array, first: array, divisors: int, static: tuple[int, int]) -> array:  # type: ignore[type-arg]
        """The numbers that `inputs` reads; the others are addresses of what must outlive it."""
        bottom, top = (0, 0) if self.activations is None else bounds(self.activations)
        shifted = self.activations is not None and not self.activations.symmetric
        found = {
            Inputs.COLUMNS: self.columns,
            Inputs.RUNS: len(self.runs.spans),
            Inputs.LENGTH: self.runs.length,
            Inputs.TABLE: address(table),
            Inputs.GROUPS: len(self.runs.first) - 1,
            Inputs.FIRST: address(first),
            Inputs.DIVISORS: divisors,
            Inputs.STATIC: static[0],
            Inputs.STATIC_ZERO: static[1],
            Inputs.SHIFTED: int(shifted),
            Inputs.BOTTOM: bottom,
            Inputs.TOP: top,
        }
        return array("q", [found[place] for place in Inputs])


def address(numbers: "array[int]") -> int:
    return numbers.buffer_info()[0]


class Tiled:
    """A weight [out, in] as the code wants it."""

    def __init__(self, Q: Quantized, level: Level, preparation: Preparation) -> None:
        """Q without a mask."""
        self.level, self.preparation, runs = level, preparation, preparation.runs
        activations = preparation.activations
        self.out_features, self.in_features = Q.shape
        self.tile = Tile(
            bits=Q.grid.bits,
            scale=str(Q.scale.dtype).removeprefix("torch."),
            zeros=not Q.grid.symmetric,
            sums=activations is not None and not activations.symmetric,
            real=activations is None,
        )
        self._table = array("q", [n for a, b in runs.spans for n in (a, b - a)])
        self._first = array("q", runs.first)
        # the tensors are kept for their addresses
        self._divisors = None if Q.input_scale is None else Q.input_scale.float().contiguous()
        self._static = [t.float().contiguous() for t in (Q.activation_scale, Q.activation_zero) if t is not None]
        self.inputs = preparation.record(self._table, self._first, _pointer(self._divisors), self._stored())
        self._codes = self._pack(Q.codes)
        chosen = torch.tensor(runs.scale_of)
        self._scales = tiles(Q.scale[:, chosen])
        self._zeros = tiles(Q.zero_point[:, chosen]) if self.tile.zeros else None
        self._sums = tiles(run_sums(Q.codes, runs)) if self.tile.sums else None
        self._factors = None if Q.low_rank is None else tiles(Q.low_rank.u)
        self.inner = None if Q.low_rank is None else (Q.low_rank.v.float(), Q.low_rank.scale.float())
        self.work = engine.work(level, preparation.order, preparation.real)
        self.record = self._weight(runs)

    def _stored(self) -> tuple[int, int]:
        """Addresses of a stored scale and its zero point."""
        scale, zero = (*self._static, None, None)[:2]
        return _pointer(scale), _pointer(zero)

    def _pack(self, codes: Tensor) -> Tensor:
        runs, codes = self.preparation.runs, codes.contiguous()
        count = -(-self.out_features // ROWS)
        made = torch.empty(count, runs.padded // BLOCK, self.tile.bits, 4 * ROWS, dtype=torch.uint8)
        record = array("q", [0] * len(Pack))
        record[Pack.CODES], record[Pack.OUT] = codes.data_ptr(), self.out_features
        record[Pack.INPUTS], record[Pack.TILES] = address(self.inputs), made.data_ptr()
        record[Pack.FIRST], record[Pack.LAST] = 0, count
        engine.call(engine.pack(self.level, self.tile), record)
        return made

    def _weight(self, runs: Runs) -> "array[int]":
        found = {
            Weight.TILE: engine.tile(self.level, self.tile),
            Weight.CODES: self._codes.data_ptr(),
            Weight.SCALES: self._scales.data_ptr(),
            Weight.ZEROS: _pointer(self._zeros),
            Weight.SUMS: _pointer(self._sums),
            Weight.OUT: self.out_features,
            Weight.BLOCKS: runs.length // BLOCK,
            Weight.SCALES_COUNT: len(runs.scale_of),
            Weight.PER_SCALE: runs.per_scale,
            Weight.RANK: 0 if self._factors is None else self._factors.shape[1],
            Weight.FACTORS: _pointer(self._factors),
        }
        return array("q", [found[place] for place in Weight])

    @property
    def tiles(self) -> int:
        return self._codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the components it was made from."""
        held: Sequence[Tensor | None] = (
            self._codes, self._scales, self._zeros, self._sums, self._factors, self._divisors, *(self.inner or ()),
        )  # fmt: skip
        return sum(t.nbytes for t in held if t is not None)


def tiles(per_row: Tensor) -> Tensor:
    """[out, n] -> [tiles, n, 16], rows beyond the last filled with zeros"""
    padded = torch.nn.functional.pad(per_row, (0, 0, 0, -per_row.shape[0] % ROWS))
    return padded.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def run_sums(codes: Tensor, runs: Runs) -> Tensor:
    """int32 [out, runs]"""
    return torch.stack([codes[:, a:b].sum(1, dtype=torch.int32) for a, b in runs.spans], 1)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def preparation(grid: Grid, in_features: int, activations: Activations | None, real: bool) -> Preparation:
    """How x is prepared for a weight on this grid.  activations: as the layer says, or None; real: x as it is"""
    order = Tile(grid.bits, "").order
    columns = grid.columns(in_features)
    if real:
        # one run for each group, but no longer than rounding in float32 should go without a rest
        return Preparation(Runs.of(in_features, columns, in_features), order, None, in_features)
    if activations is None:
        activations = Activations(8, "group", input_group(in_features, columns))
    theirs = min(activations.group_size, in_features) if activations.per == "group" else in_features
    return Preparation(Runs.of(in_features, columns, theirs), order, activations, in_features)

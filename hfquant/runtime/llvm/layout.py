"""A weight in tiles, and how x must be prepared for it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ...llvm import engine
from ...llvm.machine import Level
from ...tensors.activations import bounds
from ...tensors.encoding import Activations
from ...tensors.grid import Grid
from ...tensors.layer import Quantized
from .. import integers
from . import compiled
from .codes import Tile
from .memory import room
from .packing import Pack
from .records import BLOCK, ROWS, Inputs, Weight

GROUP = 64  # columns of x that share a scale, where nothing else says so
WASTE = 2.0  # times as many columns as there are, at most, after padding


@dataclass(frozen=True)
class Runs:
    """The columns of a weight in runs that share one scale of the weight and one of x.

    spans: first column and the one after the last, of every run.  length: of each in tiles.  scale_of: the weight's
    group of every scale that is stored, one for `per_scale` runs.  first: the first run of every group of x, and the
    end.
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
    """Columns of x that share a scale, if the layer leaves it open: about `GROUP`, and a part of the weight's group."""
    if weight_columns >= in_features:
        return min(GROUP, in_features)
    parts = [n for n in range(GROUP // 2, 2 * GROUP + 1) if weight_columns % n == 0]
    return min(parts, key=lambda n: (abs(n - GROUP), n)) if weight_columns > GROUP and parts else weight_columns


@dataclass(frozen=True)
class Preparation:
    """How x becomes what tiles are multiplied by; activations: None where x stays as it is.

    Weights whose preparations are equal can share what is prepared.
    """

    runs: Runs
    order: int  # of columns
    activations: Activations | None

    @classmethod
    def of(cls, grid: Grid, in_features: int, activations: Activations | None, real: bool) -> "Preparation":
        """activations: as the layer says, or None; real: x as it is, in the same runs as if it were rounded."""
        columns = grid.columns(in_features)
        if activations is None:
            activations = Activations(8, "group", input_group(in_features, columns))
        theirs = min(activations.group_size, in_features) if activations.per == "group" else in_features
        runs = Runs.of(in_features, columns, theirs)
        return cls(runs, Tile(grid.bits, "").order, None if real else activations)


def address(numbers: "array[int]") -> int:
    return numbers.buffer_info()[0]


class Tiles:
    """A weight [out, in] in memory as the code wants it, whatever x becomes.

    within: the tiles of several weights that these are some of, from tile `start` on; None where they are their own.
    """

    within: "Tiles | None" = None
    start = 0

    def __init__(self, Q: Quantized, level: Level, how: Preparation) -> None:
        """Q without a mask."""
        self.level, self.runs, self.grid = level, how.runs, Q.grid
        self.out_features, self.in_features = Q.shape
        self.scale_type = str(Q.scale.dtype).removeprefix("torch.")
        self.table = array("q", [n for a, b in how.runs.spans for n in (a, b - a)])
        self.first = array("q", how.runs.first)
        chosen = torch.tensor(how.runs.scale_of, device=Q.codes.device)
        activations = how.activations
        self.codes = self._pack(Q.codes.contiguous())
        self.scales = tiles(Q.scale[:, chosen])
        self.zeros = None if Q.grid.symmetric else tiles(Q.zero_point[:, chosen])
        shifted = activations is not None and not activations.symmetric
        self.sums = tiles(run_sums(Q.codes, how.runs)) if shifted else None
        self.divisors = None if Q.input_scale is None else Q.input_scale.float().contiguous()
        self.static = [t.float().contiguous() for t in (Q.activation_scale, Q.activation_zero) if t is not None]
        self.factors = None if Q.low_rank is None else tiles(Q.low_rank.u)
        self.inner = None if Q.low_rank is None else (Q.low_rank.v.float(), Q.low_rank.scale.float())

    def _pack(self, codes: Tensor) -> Tensor:
        count = -(-self.out_features // ROWS)
        made = room((count, self.runs.padded // BLOCK, self.grid.bits, 4 * ROWS))
        inputs = array("q", [0] * len(Inputs))
        inputs[Inputs.COLUMNS], inputs[Inputs.RUNS], inputs[Inputs.LENGTH] = (
            self.in_features, len(self.runs.spans), self.runs.length,
        )  # fmt: skip
        inputs[Inputs.TABLE] = address(self.table)
        record = array("q", [0] * len(Pack))
        record[Pack.CODES], record[Pack.OUT] = codes.data_ptr(), self.out_features
        record[Pack.INPUTS], record[Pack.TILES] = address(inputs), made.data_ptr()
        record[Pack.FIRST], record[Pack.LAST] = 0, count
        engine.call(compiled.pack(self.level, Tile(self.grid.bits, "")), record)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the components it was made from."""
        held: Sequence[Tensor | None] = (
            self.codes, self.scales, self.zeros, self.sums, self.factors, self.divisors, *(self.inner or ()),
        )  # fmt: skip
        return sum(t.nbytes for t in held if t is not None)


class Tiled:
    """Tiles, and the code that multiplies x by them when it is prepared in one way."""

    def __init__(self, held: Tiles, how: Preparation) -> None:
        self.held, self.how = held, how
        self.out_features, self.in_features, self.tiles = held.out_features, held.in_features, held.codes.shape[0]
        self.inner = held.inner
        self.tile = Tile(
            bits=held.grid.bits,
            scale=held.scale_type,
            zeros=held.zeros is not None,
            sums=held.sums is not None,
            real=how.activations is None,
        )
        self.inputs = self._inputs()
        self.work = compiled.work(held.level, self.tile.order, self.tile.real)
        self.record = self._weight()

    def _inputs(self) -> "array[int]":
        """The numbers that `inputs` reads."""
        held, activations = self.held, self.how.activations
        bottom, top = (0, 0) if activations is None else bounds(activations)
        scale, zero = (*held.static, None, None)[:2]
        found = {
            Inputs.COLUMNS: self.in_features,
            Inputs.RUNS: len(held.runs.spans),
            Inputs.LENGTH: held.runs.length,
            Inputs.TABLE: address(held.table),
            Inputs.GROUPS: len(held.runs.first) - 1,
            Inputs.FIRST: address(held.first),
            Inputs.DIVISORS: _pointer(held.divisors),
            Inputs.STATIC: _pointer(scale),
            Inputs.STATIC_ZERO: _pointer(zero),
            Inputs.SHIFTED: int(activations is not None and not activations.symmetric),
            Inputs.BOTTOM: bottom,
            Inputs.TOP: top,
        }
        return array("q", [found[place] for place in Inputs])

    def _weight(self) -> "array[int]":
        held = self.held
        found = {
            Weight.TILE: compiled.tile(held.level, self.tile),
            Weight.CODES: held.codes.data_ptr(),
            Weight.SCALES: held.scales.data_ptr(),
            Weight.ZEROS: _pointer(held.zeros),
            Weight.SUMS: _pointer(held.sums),
            Weight.OUT: self.out_features,
            Weight.BLOCKS: held.runs.length // BLOCK,
            Weight.SCALES_COUNT: len(held.runs.scale_of),
            Weight.PER_SCALE: held.runs.per_scale,
            Weight.RANK: 0 if held.factors is None else held.factors.shape[1],
            Weight.FACTORS: _pointer(held.factors),
        }
        return array("q", [found[place] for place in Weight])


def tiles(per_row: Tensor) -> Tensor:
    """[out, n] -> [tiles, n, 16], rows beyond the last filled with zeros"""
    padded = torch.nn.functional.pad(per_row, (0, 0, 0, -per_row.shape[0] % ROWS))
    return padded.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def run_sums(codes: Tensor, runs: Runs) -> Tensor:
    """int32 [out, runs]"""
    return torch.stack([codes[:, a:b].sum(1, dtype=torch.int32) for a, b in runs.spans], 1)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

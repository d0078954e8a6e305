"""How one weight is stored and run, beyond its values: what a checkpoint's config says of a layer."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from .grid import Grid

Per = Literal["token", "group", "tensor", "static"]


@dataclass(frozen=True)
class Activations:
    """How a layer's input is rounded when it runs.

    per: one scale for each token ("token"), for each token and `group_size` columns ("group"), for the whole tensor at
    hand ("tensor"), or one measured in calibration and stored ("static").  An asymmetric grid has a zero point beside
    each scale.
    """

    bits: int = 8
    per: Per = "token"
    group_size: int = -1
    symmetric: bool = True

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.per == "group" else ""
        return f"a{self.bits}{'' if self.per == 'group' else self.per}{group}{'' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class Sparsity:
    """Which weights are stored: `n` in each `m` consecutive ones of a row, or, with m = 0, `n` in all.

    The latter, which may lie anywhere, are stored as one bit per weight beside the kept values, the former as the
    places within each m.
    """

    n: int
    m: int = 0

    def __str__(self) -> str:
        return f"{self.n}of{self.m}" if self.m else f"kept{self.n}"


@dataclass(frozen=True)
class KVCache:
    """How keys and values are kept while text is generated.

    bits: 8, 4 or 2.  window: how many of the newest tokens stay as they are, at least.  group_size: tokens that share a
    scale in a channel of keys, and channels, at most, that share one in a token's values.  queries: bits to which a
    new token's queries are rounded before they are compared with those keys, 8, for which products are those of
    integers; None: as they are.
    """

    bits: int = 8
    window: int = 64
    group_size: int = 64
    queries: int | None = None

    def __str__(self) -> str:
        return f"kv{self.bits}" + (f"q{self.queries}" if self.queries else "")

    @property
    def said(self) -> dict[str, int]:
        """As a checkpoint says it: what is not asked for is not mentioned, as before it existed."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Encoding:
    """grid: of the weights (16 bit: not quantized).  rank: of the low-rank correction, 0 = none.  scaled_input: the
    input is divided by a stored factor per column first.

    `str()` is the form in which it travels through operators; `Encoding.parse` reads it back.
    """

    grid: Grid
    sparsity: Sparsity | None = None
    rank: int = 0
    activations: Activations | None = None
    scaled_input: bool = False

    @classmethod
    def of(cls, grid: "Grid | Encoding") -> "Encoding":
        """A grid stands for itself and nothing else."""
        return grid if isinstance(grid, Encoding) else cls(grid)

    @property
    def plain(self) -> bool:
        """Whether this is a grid and nothing else: what every wire format can say."""
        return self == Encoding(self.grid)

    def __str__(self) -> str:
        parts = [str(self.grid), self.sparsity, f"r{self.rank}" if self.rank else None, self.activations]
        return "-".join(str(part) for part in [*parts, "s" if self.scaled_input else None] if part is not None)

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "Encoding":
        """The inverse of `str()`.  Raises ValueError on anything else."""
        encoding: Encoding | None = None
        for part in text.split("-"):
            if encoding is None:
                encoding = Encoding(_grid(part))
            elif found := re.fullmatch(r"(\d+)of(\d+)", part):
                encoding = replace(encoding, sparsity=Sparsity(int(found[1]), int(found[2])))
            elif found := re.fullmatch(r"kept(\d+)", part):
                encoding = replace(encoding, sparsity=Sparsity(int(found[1])))
            elif found := re.fullmatch(r"r(\d+)", part):
                encoding = replace(encoding, rank=int(found[1]))
            elif part == "s":
                encoding = replace(encoding, scaled_input=True)
            else:
                encoding = replace(encoding, activations=_activations(part))
        assert encoding is not None
        return encoding


def _grid(text: str) -> Grid:
    found = re.fullmatch(r"w(\d+)(?:g(\d+))?(sym)?", text)
    if not found:
        raise ValueError(f"`{text}` is not a grid")
    return Grid(int(found[1]), int(found[2] or -1), found[3] is not None)


def _activations(text: str) -> Activations:
    found = re.fullmatch(rf"a(\d+)(?:g(\d+)|({'|'.join(get_args(Per))}))(asym)?", text)
    if not found:
        raise ValueError(f"`{text}` says nothing about activations")
    per: Per = "group" if found[2] else found[3]  # type: ignore[assignment]
    return Activations(int(found[1]), per, int(found[2] or -1), found[4] is None)

"""What every weight may become, at what cost: the table that a choice is made from, and its JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..recipe import GridSpec
from ..recipe_budget import Share
from ..tensors.shards import write_text


@dataclass(frozen=True)
class Option:
    """One candidate of one weight.  grid: None keeps the weight.  sparsity, rank: what is pruned, and of a correction.
    nbytes: of its tensors in the files, with their entries in the header; data: without.  loss: predicted KL, nats per
    token.  seconds: to multiply one token by it, where that was measured."""

    grid: GridSpec | None
    nbytes: int
    data: int
    loss: float
    seconds: float | None = None
    sparsity: Share | None = None
    rank: int = 0

    @property
    def name(self) -> str:
        if self.grid is None:
            return "kept"
        sparse = self.sparsity if isinstance(self.sparsity, str | None) else f"-{self.sparsity:.0%}"
        return " ".join(filter(None, (str(self.grid.grid()), sparse, f"r{self.rank}" if self.rank else None)))


@dataclass(frozen=True)
class Row:
    """A weight.  layer: its name in recipes.  weights: how many numbers.  inputs: equal for weights of one block that
    read the same.  shape: (out, in), of each expert for fused experts.  tied: of embeddings, whether they are the head
    too."""

    layer: str
    kind: str
    weights: int
    inputs: str
    options: tuple[Option, ...]
    shape: tuple[int, int] = (0, 0)
    tied: bool = False


@dataclass(frozen=True)
class Table:
    """rest: bytes of all that is not chosen for.  original: of the whole model, as it is.  about: how it was made."""

    rows: tuple[Row, ...]
    rest: int
    original: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        data = asdict(self)
        for row, said in zip(self.rows, data["rows"], strict=True):
            for option, one in zip(row.options, said["options"], strict=True):
                one["grid"] = None if option.grid is None else option.grid.model_dump()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(data, indent=1))

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> "Table | None":
        """None where there is none, or one of another fingerprint: what is in it may be of another version."""
        data = json.loads(path.read_text("utf-8")) if path.is_file() else None
        if data is None or data["about"].get("fingerprint") != fingerprint:
            return None
        rows = []
        for said in data["rows"]:
            options = [
                Option(**one | {"grid": None if one["grid"] is None else GridSpec(**one["grid"])})
                for one in said["options"]
            ]
            rows.append(Row(**said | {"options": tuple(options), "shape": tuple(said["shape"])}))
        return cls(tuple(rows), data["rest"], data["original"], data["about"])

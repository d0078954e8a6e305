"""What a compressed model is made of, layer by layer, as it is read back from disk."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..plugin import load
from ..runtime.nn import Packed
from ..tensors.layer import Quantized


@dataclass(frozen=True)
class LayerFacts:
    """One compressed weight.  `sparsity`: the share of weights that are exactly zero."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    symmetric: bool
    sparsity: float
    error: float | None
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def layers(folder: Path, report: Mapping[str, Any]) -> Iterator[LayerFacts]:
    """The packed layers of a checkpoint in the model's order.

    `report` is its report.json, where the errors come from.  Raises what `hfquant.load` raises.
    """
    errors = {row["name"]: row.get("error") for row in report.get("layers", ())}
    for name, module in load(folder).named_modules():
        if isinstance(module, Packed):
            yield _facts(name, module, errors.get(name))


def _facts(name: str, module: Packed, error: float | None) -> LayerFacts:
    return LayerFacts(
        name=name,
        shape=module.shape,
        bits=module.grid.bits,
        group_size=module.grid.group_size,
        symmetric=module.grid.symmetric,
        sparsity=zeros(module.quantized()),
        error=error,
        bytes=sum(part.nbytes for part in module.parts),
    )


def zeros(Q: Quantized) -> float:
    """The share of weights that are exactly zero."""
    return float((Q.codes == Q.grid.expand(Q.zero_point, Q.shape[1])).float().mean())

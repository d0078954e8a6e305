"""What a compressed model is made of, layer by layer, as it is read back from disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from ..plugin import load
from ..runtime.experts import QExperts
from ..runtime.nn import Packed
from ..tensors.grid import Grid
from ..tensors.layer import Quantized


@dataclass(frozen=True)
class LayerFacts:
    """One compressed weight [out, in], or [experts, out, in].

    sparsity: the share of weights that are exactly zero.  error: relative output error, from the report.
    """

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
    """The packed layers of a checkpoint in the model's order; a tied head is its embedding.

    `report` is its report.json, where the errors come from.  Raises what `hfquant.load` raises.
    """
    errors = {row["name"].removesuffix(".weight"): row.get("error") for row in report.get("layers", ())}
    seen: set[int] = set()
    for name, module in load(folder).named_modules():
        if isinstance(module, Packed) and id(module.parts[0]) not in seen:
            seen.add(id(module.parts[0]))
            yield _facts(name, module.shape, module.grid, [zeros(module.quantized())], module.parts, errors)
        elif isinstance(module, QExperts):
            for param, shape in module.packed.items():
                each = [zeros(module.quantized(param, expert)) for expert in range(shape[0])]
                yield _facts(f"{name}.{param}", shape, module.grid, each, module.parts(param), errors)


def _facts(
    name: str,
    shape: tuple[int, ...],
    grid: Grid,
    sparsity: Sequence[float],
    parts: Sequence[Tensor],
    errors: Mapping[str, float | None],
) -> LayerFacts:
    return LayerFacts(
        name=name,
        shape=tuple(shape),
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        sparsity=fmean(sparsity),
        error=errors.get(name),
        bytes=sum(part.nbytes for part in parts),
    )


def zeros(Q: Quantized) -> float:
    """The share of weights that are exactly zero."""
    return float((Q.codes == Q.grid.expand(Q.zero_point, Q.shape[1])).float().mean())

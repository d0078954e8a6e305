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
from ..tensors.encoding import Encoding
from ..tensors.layer import Quantized


@dataclass(frozen=True)
class LayerFacts:
    """One compressed weight [out, in], or [experts, out, in].

    sparsity: the share of weights that are exactly zero; pattern: how they lie, `2of4`, or `any` where only the others
    are stored, None where zeros are stored like the rest.  rank: of the low-rank correction.  activations: how its
    input is rounded, as in a recipe, `scaled` where it is divided by a stored factor per column first.
    error: relative output error, from the report.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    symmetric: bool
    sparsity: float
    pattern: str | None
    rank: int
    activations: str | None
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
            yield _facts(name, module.shape, module.encoding, [zeros(module.quantized())], module.parts, errors)
        elif isinstance(module, QExperts):
            for param, shape in module.packed.items():
                each = [zeros(module.quantized(param, expert)) for expert in range(shape[0])]
                yield _facts(f"{name}.{param}", shape, module.encoding, each, module.parts(param), errors)


def _facts(
    name: str,
    shape: tuple[int, ...],
    encoding: Encoding,
    sparsity: Sequence[float],
    parts: Sequence[Tensor],
    errors: Mapping[str, float | None],
) -> LayerFacts:
    grid, places, reading = encoding.grid, encoding.sparsity, encoding.activations
    said = [text for text in (str(reading or ""), "scaled" if encoding.scaled_input else "") if text]
    return LayerFacts(
        name=name,
        shape=tuple(shape),
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        sparsity=fmean(sparsity),
        pattern=(str(places) if places.m else "any") if places else None,
        rank=encoding.rank,
        activations=" ".join(said) or None,
        error=errors.get(name),
        bytes=sum(part.nbytes for part in parts),
    )


def zeros(Q: Quantized) -> float:
    """The share of weights that are exactly zero."""
    Q = Q.filled
    if Q.grid.is_float:
        return float((Q.codes == 0).float().mean())
    return float((Q.codes == Q.grid.expand(Q.zero_point, Q.shape[1])).float().mean())

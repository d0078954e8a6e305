"""What is told of a compression: layer by layer while it runs, and in the report when it is done."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..machine import hardware, peak_memory, versions
from ..model.calibration import digest
from ..model.rewritten import Rewritten
from ..report import merge
from ..tensors.grid import Grid
from .plan import Plan


@dataclass(frozen=True)
class LayerResult:
    """A finished layer: what progress, report and card are made of.

    encoding: of what is stored, as text.  error: ‖(W − Ŵ)X‖ / ‖WX‖ on the calibration inputs, ‖W − Ŵ‖ / ‖W‖ where
    there were none; of a method that aims at shifted weights, to match the original model, the distance from these.
    trail: the same after each step.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    grid: Grid
    method: str
    error: float | None
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]
    block: int
    blocks: int
    trail: tuple[tuple[str, float], ...] = ()
    encoding: str = ""


def row(result: LayerResult) -> dict[str, Any]:
    """As the journal and the report have it."""
    found = asdict(result)
    found["grid"] = asdict(result.grid)
    return found


def record(
    plan: Plan, rows: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]], config: Mapping[str, Any],
    files: Sequence[str], seconds: float, resumed: int,
) -> None:  # fmt: skip
    """Write what was done into the report beside the result.

    rows, sites: of the layers, and of what steps decided for blocks.  config: of how the layers are stored.  files: all
    that was written.  resumed: blocks that were finished before.
    """
    source = plan.source
    calibration = None
    if plan.tokens is not None:
        calibration = plan.recipe.calibration.model_dump() | {"sha256": digest(plan.tokens)}
    rows = sorted(rows, key=lambda row: row["block"])
    merge(
        plan.out,
        source={
            "id": source.id, "revision": source.revision, "bytes": source.total_bytes,
            "parameters": source.parameters, "dtype": str(source.dtype).removeprefix("torch."),
        },
        recipe=plan.recipe.model_dump(mode="json"),
        calibration=calibration,
        wire={"format": plan.wire.format, "config": config},
        layers=rows,
        compression={
            "seconds": seconds, "peak_memory_bytes": peak_memory(), "hardware": hardware(),
            "versions": versions(), "resumed": resumed,
            "compute_dtype": str(plan.skeleton.dtype).removeprefix("torch."),
        } | ({"sites": sites} if sites else {})
        | ({"rewritten": source.about} if isinstance(source, Rewritten) else {}),
        output={
            "bytes": sum((plan.out / f).stat().st_size for f in files if f.endswith(".safetensors")),
            "files": files,
        },
    )  # fmt: skip

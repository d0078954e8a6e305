"""An adapter that was trained on a compressed checkpoint becomes part of it: added, and rounded again.

Ŵ + s·BA (LoRA; Hu et al., 2021; arXiv:2106.09685; on rounded weights QLoRA; Dettmers et al., 2023; arXiv:2305.14314)
lies on no grid.  It is rounded to the layer's own, with scales searched anew where that comes closer, and what that
costs is said: of every layer the part of the adapter that is left, of the whole model its distance from the unmerged
one.  The rest of a layer (mask, low-rank correction, how inputs are read) stays.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tensors.grid import Grid
from ..tensors.layer import Quantized

SEARCH = 40  # narrower ranges that are tried for each group


@dataclass(frozen=True)
class Merged:
    """What became of one layer's adapter.  With W the weight before, Δ the adapter and Ŵ' the result:

    error: ‖Ŵ' − W − Δ‖ / ‖W + Δ‖.  adapter_error: ‖Ŵ' − W − Δ‖ / ‖Δ‖; above 1, no adapter would be closer to it.
    kept: ⟨Ŵ' − W, Δ⟩ / ‖Δ‖², the share of the adapter that is left in its own direction.
    """

    name: str
    error: float
    adapter_error: float
    kept: float


@torch.no_grad()
def requantize(Q: Quantized, delta: Tensor) -> Quantized:
    """Q with delta float32 [out, in] added to what it decodes to, on the same grid, stored in the same way."""
    W = Q.dequantize() + delta
    if Q.input_scale is not None:
        W = W * Q.input_scale
    if Q.low_rank is not None:
        W = W - Q.low_rank.dense()
    if Q.mask is not None:
        W = W * Q.mask
    if Q.grid.is_float:
        return replace(Q, codes=W.to(Q.codes.dtype))
    scale, zero = Q.grid.fit(W, search=SEARCH, dtype=Q.scale.dtype)
    worse = _lost(Q.grid, W, Q.scale, Q.zero_point) <= _lost(Q.grid, W, scale, zero)
    scale, zero = torch.where(worse, Q.scale, scale), torch.where(worse, Q.zero_point, zero)
    return replace(Q, codes=Q.grid.encode(W, scale, zero), scale=scale, zero_point=zero)


def _lost(grid: Grid, W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The squared error of every group [out, groups]."""
    error = (grid.decode(grid.encode(W, scale, zero), scale, zero) - W).square_()
    columns = grid.columns(W.shape[1])
    padded = torch.nn.functional.pad(error, (0, -W.shape[1] % columns))
    return padded.unflatten(1, (-1, columns)).sum(-1)


def outcome(name: str, before: Tensor, delta: Tensor, after: Tensor) -> Merged:
    """All float32 [out, in]."""
    lost, moved, size = (after - before - delta).norm(), after - before, delta.square().sum().clamp(min=1e-30)
    return Merged(
        name=name,
        error=float(lost / (before + delta).norm().clamp(min=1e-30)),
        adapter_error=float(lost / size.sqrt()),
        kept=float((moved * delta).sum() / size),
    )


def settled(rows: list[Merged]) -> dict[str, Any]:
    """Means over the layers, for people."""
    n = max(1, len(rows))
    return {key: sum(getattr(row, key) for row in rows) / n for key in ("error", "adapter_error", "kept")}

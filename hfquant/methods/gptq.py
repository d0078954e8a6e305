"""GPTQ (Frantar et al., 2022; arXiv:2210.17323).

Round the columns of W one by one; spread each rounding error over the columns not yet rounded, so that
‖WX − QX‖² grows as little as possible.  H = XXᵀ over the calibration tokens.

Beside the paper's algorithm: columns in order of decreasing diag(H) with the groups' grids fixed beforehand
(so that the stored layout stays contiguous), ranges searched in the layer's own metric, a factorization whose
damping adapts, after the sweep rounds of scale refitting and coordinate descent on the same objective, and a target
that makes up for what the layers before have lost already.
The textbook is `act_order: false, static_groups: false, search: 0, refine: 0, true_sequential: false,
match_original: 0`.
"""

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..tensors.grid import Grid
from ..tensors.layer import Layer, Quantized
from ._obs import damped, inverse_factor, on_grids, sweep
from ._refine import refine
from ._streams import Observed
from ._target import aimed, wanted


class Method(Observed):
    """Options of GPTQ."""

    damp: float = Field(0.01, ge=0, le=1, description="λ as a fraction of mean(diag H); grows by itself where needed")
    act_order: bool = Field(True, description="round the columns with the largest inputs first")
    static_groups: bool = Field(True, description="fit all grids before the sweep; needed by `act_order`")
    search: int = Field(40, ge=0, description="ranges tried per group, weighted by diag(H); 0 = the extremes")
    refine: int = Field(3, ge=0, description="rounds of scale refit and coordinate descent after the sweep, at most")
    block: int = Field(128, ge=1, description="columns corrected together; speed only")

    needs_hessian: ClassVar[bool] = True

    @model_validator(mode="after")
    def _order_needs_static_groups(self) -> Self:
        if self.act_order and not self.static_groups:
            raise ValueError("act_order needs static_groups: otherwise a group's columns are not stored together")
        return self

    def __call__(self, layer: Layer, grid: Grid, scale_dtype: torch.dtype) -> Layer:
        """Quantize one layer, what is pruned of it staying zero.

        Falls back to rounding with searched ranges, and notes it, if H is unusable.
        """
        H = layer.H
        order = self._order(layer.W.shape[1], H)
        factor = None if H is None else inverse_factor(H, self.damp, order)
        if H is None or factor is None:
            W = wanted(layer)
            scale, zero = grid.fit(W, search=self.search, dtype=scale_dtype)
            Q = Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)
            return replace(layer, Q=Q, notes=(*layer.notes, "no usable Hessian: rounded to nearest"))
        U, damp = factor
        layer, done = aimed(layer, U, order, self.match_original), []
        for part in layer.parts():
            W = wanted(part)
            done.append((self._round(W, part.mask, H.diagonal(), U, order, grid, scale_dtype), W, part.mask))
        del U, factor  # as large as H
        if self.refine:
            H = damped(H, damp).float()
            done = [(refine(Q, W, H, rounds=self.refine, mask=mask), W, mask) for Q, W, mask in done]
        Q = Quantized.concatenate([Q for Q, _, _ in done])
        notes = layer.notes if damp == self.damp else (*layer.notes, f"damping raised to {damp:g}")
        return replace(layer, Q=Q, notes=notes)

    def _order(self, in_features: int, H: Tensor | None) -> Tensor:
        """The order in which columns are rounded, as indices into W."""
        if H is None or not self.act_order:
            return torch.arange(in_features)
        return torch.argsort(H.diagonal(), descending=True, stable=True)

    def _round(
        self,
        W: Tensor,
        mask: Tensor | None,
        diagonal: Tensor,
        U: Tensor,
        order: Tensor,
        grid: Grid,
        scale_dtype: torch.dtype,
    ) -> Quantized:
        n = W.shape[1]
        keep = None if mask is None else mask.T[order].contiguous()  # [in, out], in the order of the sweep
        importance = diagonal + 1e-8 * diagonal.mean()
        scale, zero = grid.fit(W, importance, search=self.search, dtype=scale_dtype)
        S, Z = scale.float().T.contiguous(), zero.float().T.contiguous()  # [groups, out]
        codes = torch.empty(n, W.shape[0], dtype=torch.uint8)
        columns, group = grid.columns(n), order // grid.columns(n)
        groups = group.tolist()

        def project(j: int, Wt: Tensor) -> Tensor:
            g = groups[j]
            if (
                not self.static_groups and j % columns == 0
            ):  # the paper's grouping: the grid of the weights as corrected by now
                group = Wt[j : j + columns] if keep is None else Wt[j : j + columns] * keep[j : j + columns]
                s, z = grid.fit(group.T, importance[j : j + columns], search=self.search, dtype=scale_dtype)
                scale[:, g], zero[:, g] = s[:, 0], z[:, 0]
                S[g], Z[g] = s[:, 0].float(), z[:, 0].float()
            code = (Wt[j] / S[g]).add_(Z[g]).round_().clamp_(0, grid.top)
            if keep is not None:
                code = torch.where(keep[j], code, Z[g])  # what is pruned stays zero; the columns to come make up for it
            codes[j] = code
            return code.sub_(Z[g]).mul_(S[g])

        # the paper's grouping reads a whole group as corrected so far, so a block must not end inside one
        block = self.block if self.static_groups else max(1, self.block // columns) * columns
        together = on_grids(U, group, S, Z, grid.top, keep, codes) if self.static_groups else None
        sweep(W.T[order].contiguous(), U, project, block, together)
        natural = torch.empty_like(codes)
        natural[order] = codes
        return Quantized(codes=natural.T.contiguous(), scale=scale, zero_point=zero, grid=grid)

"""AWQ, activation-aware weight quantization (Lin et al., 2023; arXiv:2306.00978).

A weight matters as much as what it is multiplied with.  Columns of W whose inputs are large are multiplied by s > 1
before rounding, and so are rounded more finely; their inputs are divided by s, in whatever makes them:

    s = mean|X|^α,    α = argmin ‖W X − Q(W diag(s)) diag(s)⁻¹ X‖    (equations 4 and 5).

The error needs no second look at X: with H = XXᵀ it is tr(D H Dᵀ), D being the error of the weights.  Only weights are
rounded.  The paper's other half, clipping, is what `rtn` and `gptq` do anyway when they search for a range.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..model.sites import Site
from ..tensors.grid import Grid
from ._scaling import WORTH, on_grid, rescalable, tied

if TYPE_CHECKING:
    from ..compress.view import BlockView, Seen

LEAST = 1e-4  # of s, as in the authors' code


class Method(BaseModel):
    """Options of AWQ."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "block"
    needs_hessian: ClassVar[bool] = True

    steps: int = Field(20, ge=1, le=100, description="α is tried from 0 to 1 in so many steps")
    weights: bool = Field(False, description="also by the size of the weights: s = mean|X|^α / mean|W|^(1−α)")
    inner: bool = Field(True, description="also the inputs of output and down projections, where that is exact")
    explicit: bool = Field(
        False, description="divide the input at run time where nothing before it can; needs `format: native`"
    )

    def __call__(self, view: "BlockView") -> None:
        """Rescale the groups of a block, in place."""
        for site in rescalable(view, self.inner, self.explicit):
            seen = view.seen([site], hessian=True)[site]  # one at a time: H is as large as a weight
            before = self._error(view, site, seen, None)
            best, alpha, chosen = before if site.maker else WORTH**2 * before, 0.0, None
            for i in range(1, self.steps + 1):
                s = tied(site, self._factors(view, site, seen, i / self.steps))
                if (error := self._error(view, site, seen, s)) < best:
                    best, alpha, chosen = error, i / self.steps, s
            if chosen is not None:
                whole = self._whole(view, site, seen)
                found = {"error_before": (before / whole) ** 0.5, "error": (best / whole) ** 0.5}
                view.rescale(site, chosen, "awq", alpha=alpha, **found)

    def _factors(self, view: "BlockView", site: Site, seen: "Seen", alpha: float) -> Tensor:
        s = seen.mean.pow(alpha)
        if self.weights:
            sizes = [size(view.weight(weight), view.grids.get(weight)) for weight in site.members]
            s = s / torch.stack(sizes).mean(0).pow(1 - alpha).clamp(min=LEAST)
        s = torch.where(seen.mean > 0, s.clamp(min=LEAST), torch.ones_like(s))
        return s / (s.max() * s.min()).sqrt()

    def _error(self, view: "BlockView", site: Site, seen: "Seen", s: Tensor | None) -> float:
        """‖(W − Ŵ)X‖² over all members"""
        assert seen.H is not None
        total = 0.0
        for weight in site.members:
            if weight in view.grids:
                W = view.weight(weight)
                D = W - on_grid(W, s, view.grids[weight], view.scale_dtype)
                total += float(((D @ seen.H) * D).sum())
        return total

    def _whole(self, view: "BlockView", site: Site, seen: "Seen") -> float:
        """‖WX‖² over all members"""
        assert seen.H is not None
        W = torch.cat([view.weight(weight) for weight in site.members if weight in view.grids])
        return max(float(((W @ seen.H) * W).sum()), 1e-30)


def size(W: Tensor, grid: Grid | None) -> Tensor:
    """Mean over the rows of |W_ij| as a share of the largest in its group.  W [out, in] -> [in]"""
    n = W.shape[1]
    width = n if grid is None else grid.columns(n)
    grouped = torch.nn.functional.pad(W.abs(), (0, -n % width)).unflatten(1, (-1, width))
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1)[:, :n].mean(0)

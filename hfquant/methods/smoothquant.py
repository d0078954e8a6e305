"""SmoothQuant (Xiao et al., 2022; arXiv:2211.10438).

Y = (X diag(s)⁻¹)(diag(s) W): a few channels of X are far larger than all others and would decide its scale, while W is
flat.  s moves the difficulty from one to the other,

    s_j = max|X_j|^α / max|W_j|^(1−α)    (equation 4),

over all calibration tokens and all layers that read X.  1/s goes into whatever makes X, so it costs nothing when the
model runs.

Beside the paper: without an α, the factors are those with the least error that can be predicted of rounding weights
and inputs (`_balance.py`), found from the best α on; beside the norms, values and the up projections of gated MLPs take
factors for the layers behind them; where nothing can take them, as in models with norms behind their layers, the layers
divide their input themselves.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..model.sites import Rows, Site
from ._balance import Balance, Reader
from ._scaling import WORTH, lost, rescalable, tied

if TYPE_CHECKING:
    from ..compress.view import BlockView, Seen

LEAST = 1e-5  # of max|W_j|, and of s: the paper's code has the same floor


class Method(BaseModel):
    """Options of SmoothQuant."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "block"
    needs_hessian: ClassVar[bool] = True

    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how much of the difficulty the weights get, 0.5 in the paper; null: the best factors are searched",
    )
    steps: int = Field(10, ge=1, le=100, description="of a search: α is tried from 0 to 1 in so many steps")
    descend: int = Field(40, ge=0, le=1000, description="of a search: steps from the best α to better factors")
    inner: bool = Field(True, description="also the inputs of output and down projections, where that is exact")
    explicit: bool = Field(
        True, description="divide the input at run time where nothing before it can; needs `format: native`"
    )

    def __call__(self, view: "BlockView") -> None:
        """Rescale the groups of a block, in place."""
        sites = rescalable(view, self.inner, self.explicit)
        seen = view.seen(sites, whole=self.alpha is not None)
        for site in sites:
            if self.alpha is None:
                s, found = self._searched(view, site, seen[site])
            else:
                s, found = self._factors(view, site, seen[site], self.alpha), {"alpha": self.alpha}
            if s is not None:
                view.rescale(site, s, "smoothquant", **found)

    def _factors(self, view: "BlockView", site: Site, seen: "Seen", alpha: float) -> Tensor:
        W = torch.stack([view.weight(weight).abs().amax(0) for weight in site.members]).amax(0)
        return tied(site, factors(seen.absmax, W, alpha))

    def _searched(self, view: "BlockView", site: Site, seen: "Seen") -> tuple[Tensor | None, dict[str, Any]]:
        """The factors with the least predicted error; None if rounding does not lose less with them than without."""
        how = view.rounded(site, seen.sample)
        readers = [
            Reader(view.weight(w), view.grids[w], how[w].activations if w in how else None)
            for w in site.members
            if w in view.grids
        ]
        balance = Balance(seen.sample, seen.low, seen.high, readers)
        alphas = [i / self.steps for i in range(self.steps + 1)]
        tried = [self._factors(view, site, seen, alpha).log() for alpha in alphas]
        errors = [balance.error(u)[0] for u in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        source = site.maker.rows.to(seen.low.device) if isinstance(site.maker, Rows) else None
        s = balance.descend(tried[best], self.descend, source).exp()
        before, after = lost(view, site, seen.sample, None), lost(view, site, seen.sample, s)
        better = after < before * (1 if site.maker else WORTH)
        return s if better else None, {"alpha": alphas[best], "error_before": before, "error": after}


def factors(x: Tensor, W: Tensor, alpha: float) -> Tensor:
    """Equation 4.  x, W [in]: the largest magnitudes of every channel -> s [in], 1 where a channel is always zero."""
    s = (x.float().pow(alpha) / W.float().clamp(min=LEAST).pow(1 - alpha)).clamp(min=LEAST)
    return torch.where(x > 0, s, torch.ones_like(s))

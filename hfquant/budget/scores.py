"""The KL divergence that rounding one weight to each of several grids is predicted to cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import Method, kind
from ..methods._obs import inverse_factor
from ..recipe import Recipe
from .candidates import Candidate
from .moments import Sums


def rounding(recipe: Recipe) -> Method:
    """The step that rounds."""
    return next(step.build() for step in recipe.steps if kind(step.method) == "quantize")


def whole(S: Tensor) -> Tensor:
    """A symmetric matrix of which only what is on and below the diagonal is given."""
    lower = S.cpu().tril()
    return lower + lower.tril(-1).T


def spread(H: Tensor, step: Method) -> Tensor | None:
    """M of `moments`: how a step that rounds carries residuals on.  H [in, in].  None where it does not."""
    if not step.needs_hessian:
        return None
    ordered = getattr(step, "act_order", False)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if ordered else torch.arange(len(H))
    factor = inverse_factor(H, getattr(step, "damp", 0.01), order)
    if factor is None:
        return None
    U = factor[0]
    M = torch.empty_like(U)
    M[order[:, None], order] = U / U.diagonal()[:, None]
    return M


def losses(
    W: Tensor, sums: Sums, importance: Tensor | None, options: Sequence[Candidate], search: int, dtype: torch.dtype
) -> list[float]:
    """KL, nats per token, of each of these candidates.  W [rows, in]: those rows that `sums` looks at.

    importance [in], search, dtype: of `Grid.fit`.
    """
    found = []
    for option in options:
        if option.grid is None:
            found.append(0.0)
            continue
        grid = option.grid.grid()
        scale, zero = grid.fit(W, importance, search=search, dtype=dtype)
        found.append(sums.loss(W - grid.decode(grid.encode(W, scale, zero), scale, zero)))
    return found

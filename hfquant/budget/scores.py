"""The KL divergence that rounding one weight to each of several grids is predicted to cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import Method, kind
from ..methods._obs import inverse_factor
from ..recipe import Recipe
from ..tensors.grid import Grid
from .moments import Sums


def rounding(recipe: Recipe) -> Method:
    """The step that rounds."""
    return next(step.build() for step in recipe.steps if kind(step.method) == "quantize")


def whole(S: Tensor) -> Tensor:
    """A symmetric matrix of which only what is on and below the diagonal is given."""
    lower = S.cpu().tril()
    return lower + lower.tril(-1).T


def spread(H: Tensor, recipe: Recipe) -> Tensor | None:
    """M of `moments`: how the recipe's rounding carries residuals on.  H [in, in].  None where it does not."""
    step = rounding(recipe)
    if not getattr(step, "needs_hessian", False):
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
    W: Tensor, sums: Sums, importance: Tensor | None, grids: Sequence[Grid], search: int, dtype: torch.dtype
) -> list[float]:
    """KL, nats per token, of W [rows, in], those rows that `sums` looks at, on each of these grids.

    importance [in], search, dtype: of `Grid.fit`.
    """
    found = []
    for grid in grids:
        scale, zero = grid.fit(W, importance, search=search, dtype=dtype)
        found.append(sums.loss(W - grid.decode(grid.encode(W, scale, zero), scale, zero)))
    return found

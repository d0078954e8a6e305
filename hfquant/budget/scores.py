"""The KL divergence that rounding one weight to each of several grids is predicted to cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import Method, kind
from ..methods._obs import inverse_factor
from ..recipe import Recipe
from ..tensors.grid import Grid
from .candidates import Candidate
from .moments import Sums


def rounding(recipe: Recipe) -> Method:
    """The step that rounds."""
    return next(step.build() for step in recipe.steps if kind(step.method) == "quantize")


def whole(S: Tensor) -> Tensor:
    """A symmetric matrix of which only what is on and below the diagonal is given."""
    lower = S.cpu().tril()
    return lower + lower.tril(-1).T


@dataclass(frozen=True)
class Spread:
    """M [in, in] of `moments`, upper triangular with its rows and columns in order.  order int64 [in]: in which columns
    are rounded.  diagonal [in]: of U, by column."""

    M: Tensor
    order: Tensor
    diagonal: Tensor

    def residuals(self, error: Tensor) -> Tensor:
        """r [rows, in] of ΔW = r M."""
        M = self.M[self.order[:, None], self.order]
        found = torch.empty_like(error)
        found[:, self.order] = torch.linalg.solve_triangular(
            M, error[:, self.order], upper=True, left=False, unitriangular=True
        )
        return found


def spread(H: Tensor, step: Method) -> Spread | None:
    """How a step that rounds carries residuals on.  H [in, in].  None where it does not."""
    if not step.needs_hessian:
        return None
    ordered = getattr(step, "act_order", False)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if ordered else torch.arange(len(H))
    factor = inverse_factor(H, getattr(step, "damp", 0.01), order)
    if factor is None:
        return None
    U = factor[0]
    M, diagonal = torch.empty_like(U), torch.empty(len(U))
    M[order[:, None], order] = U / U.diagonal()[:, None]
    diagonal[order] = U.diagonal()
    return Spread(M, order, diagonal)


def rounded(W: Tensor, diagonal: Tensor, grid: Grid, step: Method, dtype: torch.dtype) -> Tensor:
    """What is rounded away of W [rows, in], on grids fitted as that step does.  diagonal [in]: of H."""
    importance = diagonal + 1e-8 * diagonal.mean() if step.needs_hessian else None
    return residuals(W, importance, grid, int(getattr(step, "search", 0)), dtype)


def residuals(W: Tensor, importance: Tensor | None, grid: Grid, search: int, dtype: torch.dtype) -> Tensor:
    """What rounding to nearest takes away.  importance [in], search, dtype: of `Grid.fit`."""
    scale, zero = grid.fit(W, importance, search=search, dtype=dtype)
    return W - grid.decode(grid.encode(W, scale, zero), scale, zero)


def losses(W: Tensor, sums: Sums, options: Sequence[Candidate], search: int, dtype: torch.dtype) -> list[float]:
    """KL, nats per token, of each of these candidates, rounded to nearest.  W [rows, in]: those rows that `sums` looks
    at.  search, dtype: of `Grid.fit`.
    """
    grids = (None if option.grid is None else option.grid.grid() for option in options)
    return [0.0 if grid is None else sums.loss(residuals(W, None, grid, search, dtype)) for grid in grids]

"""The optimal-brain-surgeon machinery that GPTQ and SparseGPT share (Hassibi & Stork, 1993; GPTQ section 3).

All matrices are transposed here, [in, out]: a column of W is a contiguous row, and one step of the sweep reads
and writes contiguous memory only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..llvm import refused

# A damping above this fraction of the mean diagonal has drowned the Hessian: rounding to nearest is as good.
MOST_DAMP = 1.0
LEAF = 96  # columns of a triangular matrix that are inverted without products


Together = Callable[[int, int, Tensor], Tensor | None]


def damped(H: Tensor, damp: float) -> Tensor:
    """H + λI in float64, λ = damp · mean(diag H), with 1 at the diagonal of columns that were never active.

    A column without input has no off-diagonal entries either, so it is rounded to nearest and disturbs nothing.
    """
    H = H.double()
    diagonal = H.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += damp * mean
    return H


def inverse_factor(H: Tensor, damp: float) -> tuple[Tensor, float] | None:
    """Upper Cholesky factor U of (H + λI)⁻¹ = UᵀU, and the damping that it took.

    H [in, in] -> U float32 [in, in].  The damping is multiplied by ten until the factorization succeeds (a Hessian
    of fewer tokens than columns is singular up to rounding).  None if H is not finite or nothing up to
    `MOST_DAMP` helps.

    The inverse is not formed: from the last column to the first, H + λI = RRᵀ with R upper, so U = R⁻¹.
    """
    if not torch.isfinite(H).all():
        return None
    n = H.shape[0]
    while damp <= MOST_DAMP:
        # one name for all: at most two of these matrices are held at a time
        L = damped(H.flip(0, 1), damp)
        least = n * torch.finfo(L.dtype).eps * L.diagonal()
        L, failed = torch.linalg.cholesky_ex(L)
        if not failed and (L.diagonal().square() > least).all():
            L = invert_lower(L)
            if torch.isfinite(L).all():
                return L.float().flip(0, 1).contiguous(), damp
        damp = max(10 * damp, 1e-4)
    return None


def invert_lower(L: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in its place: by halves, so that nearly all of it is products."""
    n = L.shape[0]
    if n <= LEAF:
        return L.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
    h = n // 2
    A, B, C = invert_lower(L[:h, :h]), invert_lower(L[h:, h:]), L[h:, :h]
    C.copy_((B @ C @ A).neg_())
    return L


def solved(U: Tensor, B: Tensor) -> Tensor:
    """(H + λI)⁻¹ B = Uᵀ (U B), a few rows of the result at a time, so that most of U's zeros are left out."""
    step = -(-len(U) // 4)
    parts = [slice(a, a + step) for a in range(0, len(U), step)]
    UB = torch.cat([U[rows, rows.start :] @ B[rows.start :] for rows in parts])
    return torch.cat([U[: rows.stop, rows].T @ UB[: rows.stop] for rows in parts])


def sweep(
    Wt: Tensor,
    U: Tensor,
    project: Callable[[int, Tensor], Tensor],
    block: int = 128,
    together: "Together | None" = None,
) -> Tensor:
    """Replace W column by column, pushing each error onto the columns still to come (GPTQ algorithm 1).

    Wt [in, out], U [in, in] from `inverse_factor`.  `project(j, Wt)` returns the new column j, given the weights as
    corrected so far.  Columns inside a block are corrected at once, the rest once per block: `block` changes the
    speed, not the result.  Returns the projected [in, out].

    `together(a, b, Wt)` may do the columns a..b of a block itself, without writing them to Wt, and returns their
    errors E [b − a, out]; or None, and they are done here.  See `on_grids`.
    """
    Wt = Wt.clone()
    n = Wt.shape[0]
    for a in range(0, n, block):
        b = min(a + block, n)
        E = None if together is None else together(a, b, Wt)
        if E is None:
            E = torch.empty_like(Wt[a:b])
            for j in range(a, b):
                w = Wt[j].clone()
                Wt[j] = project(j, Wt)
                e = torch.div(w - Wt[j], U[j, j], out=E[j - a])
                Wt[j + 1 : b].addr_(U[j, j + 1 : b], e, alpha=-1)
        Wt[b:].addmm_(U[a:b, b:].T, E, alpha=-1)
    return Wt


def on_grids(
    U: Tensor, groups: Tensor, S: Tensor, Z: Tensor, top: int, keep: Tensor | None, codes: Tensor
) -> Together | None:
    """For `sweep`: blocks of columns whose grids are fixed, rounded in generated code.  None where there is none.

    groups int64 [in]: each column's row of scales S and zero points Z [groups, out].  What `keep` [in, out] leaves out
    gets its zero point.  The codes are written to `codes` uint8 [in, out].
    """
    if refused(U, S, Z, codes) is not None:
        return None
    from . import _columns

    U = U.contiguous()

    def together(a: int, b: int, Wt: Tensor) -> Tensor | None:
        if b - a > _columns.MOST:
            return None
        kept = None if keep is None else keep[a:b]
        return _columns.round_block(Wt[a:b], U[a:b, a:], groups[a:b], S, Z, top, kept, codes[a:b])

    return together

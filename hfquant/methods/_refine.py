"""Descend the layer objective f(Q) = tr((Q − W) H (Q − W)ᵀ) from a quantized start.

Two moves in turn, each exact in what it solves: all scales of a row at once by least squares with the codes
fixed, then one coordinate descent over the codes with the scales fixed (each column moves to the grid point
nearest to its optimum given all others; QuantEase, Behdin et al., 2023, arXiv:2309.01885).  A row keeps a round
only if its objective fell, so no row ever ends worse than it began.
"""

import torch
from torch import Tensor

from ..llvm import refused
from ..tensors.grid import Grid, storable
from ..tensors.layer import Quantized

ELEMENTS = 1 << 25  # of the largest temporary of `refit`: rows are handled that many elements at a time
NARROW = 8  # columns of a group, below which generated code is no faster
WORTH = 1e-4  # a round that lowers f by less than this part of it is the last


def refine(
    Q: Quantized, W: Tensor, H: Tensor, *, rounds: int, block: int = 128, mask: Tensor | None = None
) -> Quantized:
    """Lower f(Q).  W [out, in] float32; H float32 [in, in], damped; mask bool [out, in], False where Q stays zero."""
    grid, dtype, columns = Q.grid, Q.scale.dtype, Q.grid.columns(W.shape[1])
    pruned = None if mask is None else ~mask.T.contiguous()
    Wt, H = W.T.contiguous(), H.contiguous()
    codes, scale = Q.codes.T.float().contiguous(), Q.scale.float()
    zero = Q.zero_point.float().T.contiguous()  # [groups, out]
    V = _shifted(codes, zero, grid)
    D = _scaled(V, scale, grid).sub_(Wt)
    P = H @ D  # half the gradient
    best, HW = (P * D).sum(0), None
    del D  # as large as W, as all that is let go here is
    for i in range(rounds):
        if i == 0:
            new_scale = refit(V, scale, H, grid, -_per_group(P.mul_(V), columns), residual=True)
            del P
        else:
            HW = H @ Wt if HW is None else HW
            V = _shifted(codes, zero, grid)
            new_scale = refit(V, scale, H, grid, _per_group(HW * V, columns))
        new_scale = storable(new_scale, dtype)
        D = _scaled(V, new_scale, grid).sub_(Wt)
        del V
        new_codes, value = descend(codes, new_scale, D, H, grid, block, pruned)
        del D
        before, better = best, value < best
        if not better.any():
            break
        codes = torch.where(better, new_codes, codes)
        scale = torch.where(better[:, None], new_scale, scale)
        best = torch.where(better, value, best)
        if best.double().sum() > (1 - WORTH) * before.double().sum():
            break
    return Quantized(
        codes=codes.T.to(torch.uint8).contiguous(), scale=scale.to(dtype), zero_point=Q.zero_point, grid=grid
    )


def objective(Qt: Tensor, Wt: Tensor, H: Tensor) -> Tensor:
    """f of every row of the weight.  Qt, Wt [in, out] -> [out]"""
    D = Qt - Wt
    return (H @ D).mul_(D).sum(0)


def refit(V: Tensor, scale: Tensor, H: Tensor, grid: Grid, b: Tensor, *, residual: bool = False) -> Tensor:
    """The scales that minimize f with the codes fixed: per row, A s = b over its groups.

    A_gh = v_gᵀ H_gh v_h and b_g = v_gᵀ (H w)_g, where v = code − zero_point.  With `residual`, b is b − A s for the
    present scales instead, that is −v_gᵀ (H d)_g with d = q − w.  Rows whose system is singular (a group of nothing but
    zero points) keep that group's scale.  V [in, out], the others float32 [out, groups], as the result.
    """
    (n, out), groups = V.shape, scale.shape[1]
    fitted = torch.empty_like(scale)
    step = max(1, ELEMENTS // max(groups * groups, n))
    for rows in (slice(a, a + step) for a in range(0, out, step)):
        A, s = products(V[:, rows], H, grid.columns(n)), scale[rows]
        pull = b[rows] if residual else b[rows] - (A @ s[..., None])[..., 0]
        diagonal = A.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 1e-6 * diagonal.amax(1, keepdim=True)
        ridge = torch.where(empty, 1.0, 1e-6 * diagonal)
        # the ridge pulls towards the present scale: it decides only where the codes say nothing
        A.diagonal(dim1=1, dim2=2).add_(ridge)
        solved, failed = torch.linalg.solve_ex(A, torch.where(empty, 0.0, pull)[..., None])
        update = solved[..., 0]
        usable = (failed == 0)[:, None] & torch.isfinite(update)
        fitted[rows] = s + torch.where(usable & ~empty, update, 0.0)
    return fitted


def products(V: Tensor, H: Tensor, columns: int) -> Tensor:
    """A_gh = v_gᵀ H_gh v_h of every row, H symmetric.  V [in, rows] -> [rows, groups, groups]"""
    n, rows = V.shape
    groups, A = -(-n // columns), None
    if columns >= NARROW and refused(V, H) is None:
        from . import _products

        A = _products.products(V, H, columns)
    if A is None:
        A = V.new_zeros(rows, groups, groups)
        for g in range(groups):  # symmetric: half of it is enough
            group, until = slice(g * columns, (g + 1) * columns), (g + 1) * columns
            A[:, g, : g + 1] = _per_group((H[:until, group] @ V[group]).mul_(V[:until]), columns)
    return A + A.tril(-1).mT


def descend(
    codes: Tensor, scale: Tensor, D: Tensor, H: Tensor, grid: Grid, block: int, pruned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent over all columns.

    codes float32 [in, out]; scale [out, groups]; D [in, out], Q − W at these, is overwritten; pruned bool [in, out]:
    codes that stay as they are.  Returns the codes, never worse, and f of every row [out] after it.
    """
    n, columns = D.shape[0], grid.columns(D.shape[0])
    S = scale.T.contiguous()  # [groups, out]
    if refused(codes, S, D, H) is None:
        from . import _descent

        if (found := _descent.descend(codes, S, D, H, columns, grid.top, block, pruned)) is not None:
            return found
    codes, value = codes.clone(), D.new_zeros(D.shape[1])
    for a in range(0, n, block):
        b = min(a + block, n)
        before = H[a:b, :a] @ D[:a]
        G = torch.addmm(before, H[a:b, a:], D[a:])  # half the gradient of f at these columns
        for j in range(a, b):
            s, old = S[j // columns], codes[j]
            step = (G[j - a] / H[j, j]).div_(s)
            new = (old - step).round_().clamp_(0, grid.top)
            if pruned is not None:
                new = torch.where(pruned[j], old, new)
            moved = (new - old).mul_(s)
            codes[j] = new
            D[j] += moved
            G[j - a + 1 :].addr_(H[j, j + 1 : b], moved)
        # f = Σ over blocks of d_bᵀ (2 H_b,<b d_<b + H_bb d_b)
        value += torch.addmm(before, H[a:b, a:b], D[a:b], beta=2).mul_(D[a:b]).sum(0)
    return codes, value


def _shifted(codes: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """code − zero point.  codes [in, out], zero [groups, out] -> [in, out]"""
    V, columns = torch.empty_like(codes), grid.columns(codes.shape[0])
    for g, z in enumerate(zero):
        group = slice(g * columns, (g + 1) * columns)
        torch.sub(codes[group], z, out=V[group])
    return V


def _scaled(V: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """V [in, out] times scale [out, groups] -> [in, out]"""
    D, columns = torch.empty_like(V), grid.columns(V.shape[0])
    for g, s in enumerate(scale.T.contiguous()):
        group = slice(g * columns, (g + 1) * columns)
        torch.mul(V[group], s, out=D[group])
    return D


def _per_group(products: Tensor, columns: int) -> Tensor:
    """Sum [in, rows] over the columns of each group -> [rows, groups]"""
    n, rows = products.shape
    padded = torch.nn.functional.pad(products, (0, 0, 0, -n % columns))
    return padded.view(-1, columns, rows).sum(1).T

"""Descend the layer objective f(Q) = tr((Q − W) H (Q − W)ᵀ) from a quantized start.

Two moves in turn, each exact in what it solves: all scales of a row at once by least squares with the codes
fixed, then one coordinate descent over the codes with the scales fixed (each column moves to the grid point
nearest to its optimum given all others; QuantEase, Behdin et al., 2023, arXiv:2309.01885).  A row keeps a round
only if its objective fell, so no row ever ends worse than it began.
"""

import torch
from torch import Tensor

from ..tensors.grid import Grid, storable
from ..tensors.layer import Quantized

ELEMENTS = 1 << 25  # of the largest temporary of `refit`: rows are handled that many elements at a time


def refine(
    Q: Quantized, W: Tensor, H: Tensor, *, rounds: int, block: int = 128, mask: Tensor | None = None
) -> Quantized:
    """Lower f(Q).  W [out, in] float32; H float32 [in, in], damped; mask bool [out, in], False where Q stays zero."""
    grid, dtype = Q.grid, Q.scale.dtype
    pruned = None if mask is None else ~mask.T.contiguous()
    Wt = W.T.contiguous()
    codes, scale, zero = Q.codes.T.float().contiguous(), Q.scale.float(), Q.zero_point.float()
    HW = H @ Wt
    best = objective(_decode(codes, scale, zero, grid), Wt, H)
    for _ in range(rounds):
        new_scale = storable(refit(codes, scale, zero, HW, H, grid), dtype)
        new_codes = descend(codes, new_scale, zero, Wt, H, grid, block, pruned)
        value = objective(_decode(new_codes, new_scale, zero, grid), Wt, H)
        better = value < best
        if not better.any():
            break
        codes = torch.where(better, new_codes, codes)
        scale = torch.where(better[:, None], new_scale, scale)
        best = torch.where(better, value, best)
    return Quantized(
        codes=codes.T.to(torch.uint8).contiguous(), scale=scale.to(dtype), zero_point=Q.zero_point, grid=grid
    )


def objective(Qt: Tensor, Wt: Tensor, H: Tensor) -> Tensor:
    """f of every row of the weight.  Qt, Wt [in, out] -> [out]"""
    D = Qt - Wt
    return (H @ D).mul_(D).sum(0)


def refit(codes: Tensor, scale: Tensor, zero: Tensor, HW: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """The scales that minimize f with the codes fixed: per row, A s = b over its groups.

    A_gh = v_gᵀ H_gh v_h and b_g = v_gᵀ (H w)_g, where v = code − zero_point.  Rows whose system is singular (a
    group of nothing but zero points) keep that group's scale.  HW [in, out] = H Wᵀ.  Returns float32 [out, groups].
    """
    n, out = HW.shape
    columns, groups = grid.columns(n), grid.groups(n)
    V = codes - grid.expand(zero, n).T  # [in, out]
    fitted = torch.empty_like(scale)
    step = max(1, ELEMENTS // max(groups * groups, n))
    for a in range(0, out, step):
        v = V[:, a : a + step]
        A = v.new_zeros(v.shape[1], groups, groups)
        for g in range(groups):  # symmetric: half of it is enough
            group, until = slice(g * columns, (g + 1) * columns), (g + 1) * columns
            A[:, g, : g + 1] = _per_group((H[:until, group] @ v[group]).mul_(v[:until]), columns)
        A += A.tril(-1).mT
        b = _per_group(HW[:, a : a + step] * v, columns)  # [rows, groups]
        diagonal = A.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 1e-6 * diagonal.amax(1, keepdim=True)
        ridge = torch.where(empty, 1.0, 1e-6 * diagonal)
        # the ridge pulls towards the present scale: it decides only where the codes say nothing
        start = scale[a : a + step]
        residual = b - (A @ start[..., None])[..., 0]
        A = A + torch.diag_embed(ridge)
        residual = torch.where(empty, 0.0, residual)
        solved, failed = torch.linalg.solve_ex(A, residual[..., None])
        update = solved[..., 0]
        usable = (failed == 0)[:, None] & torch.isfinite(update)
        fitted[a : a + step] = start + torch.where(usable & ~empty, update, 0.0)
    return fitted


def descend(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    Wt: Tensor,
    H: Tensor,
    grid: Grid,
    block: int,
    pruned: Tensor | None = None,
) -> Tensor:
    """One pass of coordinate descent over all columns.  codes float32 [in, out] -> the same, never worse.

    pruned bool [in, out]: codes that stay as they are.
    """
    n = Wt.shape[0]
    columns = grid.columns(n)
    S = scale.T.contiguous()  # [groups, out]
    codes = codes.clone()
    D = _decode(codes, scale, zero, grid) - Wt
    for a in range(0, n, block):
        b = min(a + block, n)
        G = H[a:b] @ D  # half the gradient of f at these columns
        for j in range(a, b):
            s = S[j // columns]
            old = codes[j]
            step = (G[j - a] / H[j, j]).div_(s)
            new = (old - step).round_().clamp_(0, grid.top)
            if pruned is not None:
                new = torch.where(pruned[j], old, new)
            moved = (new - old).mul_(s)
            codes[j] = new
            D[j] += moved
            G[j - a + 1 :].addr_(H[j, j + 1 : b], moved)
    return codes


def _decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """[in, out]"""
    n = codes.shape[0]
    return (codes - grid.expand(zero, n).T).mul_(grid.expand(scale, n).T)


def _per_group(products: Tensor, columns: int) -> Tensor:
    """Sum [in, rows] over the columns of each group -> [rows, groups]"""
    n, rows = products.shape
    padded = torch.nn.functional.pad(products, (0, 0, 0, -n % columns))
    return padded.view(-1, columns, rows).sum(1).T

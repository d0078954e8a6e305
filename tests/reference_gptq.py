"""GPTQ and OBQ written a second time, straight from the papers' equations, slowly, in float64.

A witness, not a tool: it shares nothing with `hfquant` (no grid, no sweep, no Cholesky factor), so that an
error would have to be made twice to stay hidden.

Frantar & Alistarh, 2022 (OBQ; arXiv:2208.11580): the weights of one row, F those not yet rounded,
    δ_F = −(w_q − quant(w_q)) / [H_F⁻¹]_qq · (H_F⁻¹)_:,q                                            (2)
    H_F∖q⁻¹ = ( H⁻¹ − (H⁻¹)_:,q (H⁻¹)_q,: / [H⁻¹]_qq ) without row and column q                      (3)
Frantar et al., 2022 (GPTQ; arXiv:2210.17323): all rows in the same order, q = 0, 1, 2, …, H = 2XXᵀ + λI.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def minmax(w: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> tuple[float, int]:
    """The range of one row's group: (scale, zero point).

    Asymmetric: [min(w, 0), max(w, 0)] over 2^bits − 1 steps.  Symmetric: the extreme of larger magnitude is
    the lowest code (−2^(bits − 1)), whichever its sign, and 0 is the middle one.  Scales as they are stored.
    """
    low, high = min(w.min().item(), 0.0), max(w.max().item(), 0.0)
    if symmetric:
        extreme = high if high > -low else low
        return _stored(-extreme / 2 ** (bits - 1), scale_dtype), 2 ** (bits - 1)
    scale = _stored((high - low) / (2**bits - 1), scale_dtype)
    return scale, max(0, min(2**bits - 1, round(-low / scale)))


def _stored(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=torch.float32).to(dtype).item()


def nearest(w: float, scale: float, zero: int, bits: int) -> int:
    """The code whose value is nearest to w; ties to the even code."""
    return max(0, min(2**bits - 1, round(w / scale + zero)))


def damped(H: Tensor, damp: float) -> Tensor:
    H = H.to(torch.float64).clone()
    return H + damp * torch.diag(H).mean() * torch.eye(len(H), dtype=torch.float64)


def eliminate(inverse: Tensor, q: int) -> Tensor:
    """(3): the inverse of H without row and column q.  They are left in place, as zeros."""
    inverse = inverse - torch.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
    inverse[q, :] = 0
    inverse[:, q] = 0
    return inverse


def gptq(
    W: Tensor,
    H: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 with blocks of one column; a group's range is taken when its first column is reached.

    W [out, in], H [in, in] -> codes [out, in], scale and zero point [out, groups], all float64.
    """
    W, inverse = W.to(torch.float64).clone(), torch.linalg.inv(damped(H, damp))
    rows, n = W.shape
    columns = n if group_size == -1 else group_size
    groups = -(-n // columns)
    codes = torch.zeros(rows, n, dtype=torch.float64)
    scale, zero = (
        torch.zeros(rows, groups, dtype=torch.float64),
        torch.zeros(rows, groups, dtype=torch.float64),
    )
    for q in range(n):
        g = q // columns
        for r in range(rows):
            if q % columns == 0:
                s, z = minmax(W[r, q : q + columns], bits, symmetric, scale_dtype)
                scale[r, g], zero[r, g] = s, z
            s, z = scale[r, g].item(), int(zero[r, g].item())
            codes[r, q] = nearest(W[r, q].item(), s, z, bits)
            error = (W[r, q] - s * (codes[r, q] - z)) / inverse[q, q]
            W[r, q:] -= error * inverse[q, q:]
        inverse = eliminate(inverse, q)
    return codes, scale, zero


def obq_row(
    w: Tensor,
    H: Tensor,
    choose: Callable[[Tensor, Tensor], int],
    code: Callable[[int, float], tuple[float, float]],
) -> Tensor:
    """OBQ of one row by its definition: after each rounding, the free weights are *solved for* again.

    w [in] float64, H damped.  `choose(w, free)` says which weight is rounded next; `code(q, w_q)` returns
    (code, value).  No inverse is updated: with the fixed weights at their values, the minimum of
    (w' − w) H (w' − w)ᵀ over the free ones is a linear system of its own each time.  -> codes [in]
    """
    original, now = w.clone(), w.clone()
    free = torch.ones(len(w), dtype=torch.bool)
    codes = torch.zeros_like(w)
    while free.any():
        q = choose(now, free)
        codes[q], now[q] = code(q, now[q].item())
        free[q] = False
        if free.any():
            moved = now[~free] - original[~free]
            now[free] = original[free] - torch.linalg.solve(H[free][:, free], H[free][:, ~free] @ moved)
    return codes

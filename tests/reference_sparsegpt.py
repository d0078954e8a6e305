"""SparseGPT written a second time, straight from the paper's equations, slowly, in float64.

A witness as `reference_gptq` is: no Cholesky factor, no blocks of corrections, nothing of `hfquant`.

Frantar & Alistarh, 2023 (arXiv:2301.00774): columns 1 .. n in order, U_j = {j, j + 1, … n}, H = XXᵀ + λI;
    (H_Uj⁻¹) from (H_U(j−1)⁻¹) by one step of elimination                                            (section 3.2)
    ε_j = w_j² / [H_Uj⁻¹]_jj decides, at the first of every B_s columns, which of them are pruned      (section 3.3)
    pruned: w_Uj ← w_Uj − w_j / [H_Uj⁻¹]_jj · (H_Uj⁻¹)_j; with rounding, w_j − quant(w_j) for w_j      (section 3.5)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference_gptq import damped, eliminate


def sparsegpt(
    W: Tensor,
    H: Tensor,
    *,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damp: float = 0.01,
    quant: Callable[[int, int, float], float] = lambda row, column, w: w,
) -> tuple[Tensor, Tensor]:
    """W [out, in], H [in, in] -> the new W, float64, and the mask, True where kept."""
    W, inverse = W.to(torch.float64).clone(), torch.linalg.inv(damped(H, damp))
    rows, n = W.shape
    diagonal, inverses = torch.zeros(n, dtype=torch.float64), []
    for j in range(n):
        inverses.append(inverse)
        diagonal[j] = inverse[j, j]
        inverse = eliminate(inverse, j)
    together = pattern[1] if pattern else block
    mask = torch.ones(rows, n, dtype=torch.bool)
    done = 0
    for j in range(n):
        if j % together == 0:
            end = min(j + together, n)
            losses = W[:, j:end] ** 2 / diagonal[j:end]
            if pattern:
                for r in range(rows):
                    order = sorted(range(j, end), key=lambda c, r=r: -losses[r, c - j].item())
                    mask[r, order[pattern[0] :]] = False
            else:
                wanted = round(sparsity * rows * end)
                places = [(losses[r, c].item(), r, c) for r in range(rows) for c in range(end - j)]
                for _, r, c in sorted(places)[: wanted - done]:
                    mask[r, j + c] = False
                done = wanted
        for r in range(rows):
            w = W[r, j].item()
            new = quant(r, j, w) if mask[r, j] else 0.0
            W[r, j:] -= (w - new) / inverses[j][j, j] * inverses[j][j, j:]
            W[r, j] = new
    return W, mask


def least_squares_row(w: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """The v with support `keep` that minimizes (v − w) H (v − w)ᵀ.  w, keep [in]; H float64, damped"""
    v = torch.zeros_like(w, dtype=torch.float64)
    v[keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ w.double())
    return v

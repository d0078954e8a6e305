"""The best weights on a given mask: least squares in every row, by conjugate gradients on all rows at once.

min tr((V − W) H (V − W)ᵀ) over V that are zero where `keep` is False.  Each row is a linear system of its own, H
restricted to what the row keeps: solved one by one, that is in³ per row.  Conjugate gradients (Hestenes & Stiefel,
1952; used so by ALPS, Meng et al., 2024, arXiv:2406.07831) take one product with H per step for all rows together, and
a sweep has already come close.
"""

import torch
from torch import Tensor

from ._refine import objective

TOLERANCE = 1e-4  # of the objective: a step that gains less is the last


def least_squares(Vt: Tensor, Wt: Tensor, keep: Tensor, H: Tensor, steps: int, tolerance: float = TOLERANCE) -> Tensor:
    """V [in, out] nearer to the best on the mask than the given one, and worse than that in no row.

    Vt, Wt float32 [in, out]; keep bool [in, out], Vt is zero where it is False; H float32 [in, in], damped.
    """
    if not steps:
        return Vt
    V, inverse = Vt.clone(), (1 / H.diagonal())[:, None]
    R = (H @ (Wt - V)).mul_(keep)  # the negative gradient where V is free
    P = R * inverse
    descent = (R * P).sum(0)
    before = objective(Vt, Wt, H)
    left = before.sum()
    for _ in range(steps):
        HP = (H @ P).mul_(keep)
        curvature = (P * HP).sum(0)
        alpha = torch.where(curvature > 0, descent / curvature, 0.0)
        V.addcmul_(P, alpha)
        R.addcmul_(HP, alpha, value=-1)
        gained = (alpha * descent).sum()
        left -= gained
        if gained <= tolerance * left:
            break
        Z = R * inverse
        new = (R * Z).sum(0)
        P.mul_(torch.where(descent > 0, new / descent, 0.0)).add_(Z)
        descent = new
    return torch.where(objective(V, Wt, H) < before, V, Vt)

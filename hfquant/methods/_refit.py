"""The best weights on a given mask: least squares in every row, by conjugate gradients on all rows at once.

min tr((V − W) H (V − W)ᵀ) over V that are zero where `keep` is False.  Each row is a linear system of its own, H
restricted to what the row keeps: solved one by one, that is in³ per row.  Conjugate gradients (Hestenes & Stiefel,
1952; used so by ALPS, Meng et al., 2024, arXiv:2406.07831) take one product with H per step for all rows together, and
a sweep has already come close.
"""

import torch
from torch import Tensor

WORTH = 0.01  # of the objective, to be gained by all steps together: one that gains less than its part is the last


def least_squares(Vt: Tensor, Wt: Tensor, keep: Tensor, H: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """V [in, out] nearer to the best on the mask than the given one, and the objective of every row with it [out].

    Vt, Wt float32 [in, out]; keep bool [in, out], Vt is zero where it is False; H float32 [in, in], damped.

    The objective is followed, not measured again: a step along P lowers it by α·⟨R, Z⟩, which is never negative.  A row
    in which that is not a number keeps the weights that it had.
    """
    D = Wt - Vt
    G = H @ D
    left = before = D.mul_(G).sum(0)
    if not steps:
        return Vt, left
    V, R, inverse = Vt.clone(), G.mul_(keep), (1 / H.diagonal())[:, None]  # R: the negative gradient where V is free
    P = R * inverse
    descent = (R * P).sum(0)
    for _ in range(steps):
        HP = (H @ P).mul_(keep)
        curvature = (P * HP).sum(0)
        alpha = torch.where(curvature > 0, descent / curvature, 0.0)
        V.addcmul_(P, alpha)
        gained = alpha * descent
        left = left - gained
        going = torch.isfinite(left)
        if gained[going].sum() <= WORTH / steps * left[going].sum():
            break
        R.addcmul_(HP, alpha, value=-1)
        Z = R * inverse
        new = (R * Z).sum(0)
        P.mul_(torch.where(descent > 0, new / descent, 0.0)).add_(Z)
        descent = new
    sound = torch.isfinite(left)
    return torch.where(sound, V, Vt), torch.where(sound, left, before)

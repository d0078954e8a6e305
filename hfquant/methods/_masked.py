"""The best weights on a given mask: least squares, row by row, by conjugate gradients on all rows at once.

min tr((V − W) H (V − W)ᵀ) over V that are zero where `mask` is False.  Exactly solved, every row has a linear system of
its own, H restricted to what the row keeps; solving those costs in³ per row.  Conjugate gradients (Hestenes & Stiefel,
1952) need one product with H per step for all rows together, and a start that a sweep has brought close (ALPS; Meng et
al., 2024; arXiv:2406.07831, section 3.3).
"""

import torch
from torch import Tensor

from ._refine import objective


def least_squares(
    Vt: Tensor, Wt: Tensor, keep: Tensor, H: Tensor, steps: int, tolerance: float = 1e-4
) -> Tensor:
    """A V [in, out] with a lower objective than the given one in no row worse.

    Vt, Wt float32 [in, out]; keep bool [in, out]; H float32 [in, in], damped.  Stops after `steps`, or when a step
    lowers the objective by less than `tolerance` of it.
    """
    start, V = Vt, Vt.clone()
    scale = (1 / H.diagonal())[:, None]
    R = (H @ (Wt - V)).mul_(keep)  # the negative gradient on the mask
    P = R * scale
    rz = (R * P).sum(0)
    before = objective(Vt, Wt, H)
    left = before.sum()
    for _ in range(steps):
        HP = (H @ P).mul_(keep)
        curvature = (P * HP).sum(0)
        alpha = torch.where(curvature > 0, rz / curvature, 0.0)
        V.addcmul_(P, alpha)
        R.addcmul_(HP, alpha, value=-1)
        gained = (alpha * rz).sum()
        left -= gained
        if gained <= tolerance * left:
            break
        Z = R * scale
        new = (R * Z).sum(0)
        P.mul_(torch.where(rz > 0, new / rz, 0.0)).add_(Z)
        rz = new
    better = objective(V, Wt, H) < before
    return torch.where(better, V, start)

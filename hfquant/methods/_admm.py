"""A better mask than a sweep's, for the whole layer at once: the alternating direction method of multipliers
(ALPS; Meng et al., 2024; arXiv:2406.07831, section 3.2).

min tr((B − W) H (B − W)ᵀ) with B = D, D zero off an allowed support:
    B = (H + ρI)⁻¹ (HW − V + ρD),   D = the best support of B + V/ρ,   V ← V + ρ(B − D).
Columns are scaled so that diag H = 1: then |w| is what pruning one weight costs, and ρ means the same in every layer.

Unlike ALPS this starts at the sweep's result, not at the largest weights, and ρ grows on a fixed schedule: eight
steps then do what takes a hundred otherwise.  So few values of ρ also make a Cholesky factorization for each cheaper
than an eigendecomposition of H and its two products a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FIRST, LAST = 0.35, 0.6  # ρ: below, the support is hardly held to; above, it hardly moves
EVERY = 4  # steps with the same ρ


def search(Dt: Tensor, Wt: Tensor, H: Tensor, choose: Callable[[Tensor], Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """The support and the weights on it: keep bool, V float32 [in, out].

    Dt [in, out]: where to start, on an allowed support.  Wt float32 [in, out]; H float32 [in, in], damped.
    `choose(scores)` returns the allowed support of highest scores.
    """
    scale = H.diagonal().sqrt()[:, None]
    H = H / scale / scale.T
    W, D = Wt * scale, Dt * scale
    HW, V, keep = H @ W, torch.zeros_like(W), D != 0
    for first in range(0, steps, EVERY):
        rho = FIRST * (LAST / FIRST) ** min(1.0, first / max(1, steps - EVERY))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + rho * torch.eye(len(H))))
        for _ in range(first, min(first + EVERY, steps)):
            B = inverse @ torch.sub(HW, V).add_(D, alpha=rho)
            T = torch.add(B, V, alpha=1 / rho)
            keep = choose(T.square())
            D = T.mul_(keep)
            V.add_(B.sub_(D), alpha=rho)
    return keep, D / scale

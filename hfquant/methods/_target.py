"""The weights that rounding and pruning aim at."""

import torch
from torch import Tensor

from ..tensors.layer import Layer
from ._obs import damped


def target(layer: Layer, damp: float, match_original: float) -> Tensor:
    """W* [out, in], such that the least tr((Q − W*) H (Q − W*)ᵀ) is the best Q.

    ‖QX − WX̃‖² = ‖(Q − W*)X‖² + const with W* = W X̃Xᵀ (XXᵀ)⁻¹: aiming at the original model's output is the ordinary
    problem on a shifted W, exactly.  W + β(W* − W), β = `match_original`, ridge-regularized like H.

    A weight that an earlier step pruned is its own target: that step has aimed already, and where it solved for the
    kept weights, what is lost to V and what is lost to W* differ by a constant.
    """
    W, H, C = kept(layer), layer.H, layer.C
    aimed = layer.V is not None or layer.mask is not None
    if H is None or C is None or aimed or not match_original or not torch.isfinite(C).all():
        return W
    L = torch.linalg.cholesky(damped(H, damp))
    drift = (C.double() - H.double()).T @ W.double().T  # (C − H)ᵀWᵀ  [in, out]
    return W + match_original * torch.cholesky_solve(drift, L).T.float()


def kept(layer: Layer) -> Tensor:
    """The weights as the steps so far left them, exactly zero where they are pruned.  float32 [out, in]"""
    return layer.current if layer.mask is None else layer.current.masked_fill(~layer.mask, 0.0)

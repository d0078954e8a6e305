"""The weights that rounding and pruning aim at."""

import torch
from torch import Tensor

from ..tensors.layer import Layer
from ._obs import solved


def target(layer: Layer, U: Tensor, order: Tensor | None, match_original: float) -> Tensor:
    """W* [out, in], such that the least tr((Q − W*) H (Q − W*)ᵀ) is the best Q.

    ‖QX − WX̃‖² = ‖(Q − W*)X‖² + const with W* = W X̃Xᵀ (XXᵀ)⁻¹: aiming at the original model's output is the ordinary
    problem on a shifted W, exactly.  W + β(W* − W), β = `match_original`, ridge-regularized like H.

    U from `inverse_factor` of H with its columns in `order`; None: as they are.  What float32 loses of W* lies where H
    is small: in the objective it is far below rounding.

    A weight that an earlier step pruned is its own target: that step has aimed already, and where it solved for the
    kept weights, what is lost to V and what is lost to W* differ by a constant.
    """
    W, H, C = kept(layer), layer.H, layer.C
    if H is None or C is None or not shifts(layer, match_original):
        return W
    drift = (C.float() - H.float()).T @ W.T  # (C − H)ᵀWᵀ  [in, out]
    order = torch.arange(W.shape[1]) if order is None else order
    shift = torch.empty_like(drift)
    shift[order] = solved(U, drift[order])
    return W + match_original * shift.T


def shifts(layer: Layer, match_original: float) -> bool:
    """Whether `target` is something else than the weights that are there."""
    aimed = layer.V is not None or layer.mask is not None
    return bool(match_original) and layer.C is not None and not aimed and bool(torch.isfinite(layer.C).all())


def kept(layer: Layer) -> Tensor:
    """The weights as the steps so far left them, exactly zero where they are pruned.  float32 [out, in]"""
    return layer.current if layer.mask is None else layer.current.masked_fill(~layer.mask, 0.0)

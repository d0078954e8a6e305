"""The weights that rounding and pruning aim at."""

from dataclasses import replace

import torch
from torch import Tensor

from ..tensors.layer import Layer
from ._obs import solved


def aimed(layer: Layer, U: Tensor, order: Tensor | None, match_original: float) -> Layer:
    """The layer with W* of `target` as its `aim`; without one where that is W.

    A weight that an earlier step pruned keeps the aim of that step: where it solved for the kept weights, what is lost
    to V and what is lost to W* differ by a constant.
    """
    if layer.V is not None or layer.mask is not None:
        return layer
    if layer.H is None or layer.C is None or not match_original or not torch.isfinite(layer.C).all():
        return replace(layer, aim=None)
    aim, at = torch.empty_like(layer.W), 0
    for part in layer.parts():
        rows = len(part.W)
        aim[at : at + rows] = target(part.W, layer.H, layer.C, U, order, match_original)
        at += rows
    return replace(layer, aim=aim)


def target(W: Tensor, H: Tensor, C: Tensor, U: Tensor, order: Tensor | None, match_original: float) -> Tensor:
    """W* [out, in], such that the least tr((Q − W*) H (Q − W*)ᵀ) is the best Q.

    ‖QX − WX̃‖² = ‖(Q − W*)X‖² + const with W* = W X̃Xᵀ (XXᵀ)⁻¹: aiming at the original model's output is the ordinary
    problem on a shifted W, exactly.  W + β(W* − W), β = `match_original`, ridge-regularized like H.

    U from `inverse_factor` of H with its columns in `order`; None: as they are.  What float32 loses of W* lies where H
    is small: in the objective it is far below rounding.
    """
    drift = (C.float() - H.float()).T @ W.T  # (C − H)ᵀWᵀ  [in, out]
    order = torch.arange(W.shape[1]) if order is None else order
    shift = torch.empty_like(drift)
    shift[order] = solved(U, drift[order])
    return W + match_original * shift.T


def wanted(layer: Layer) -> Tensor:
    """The weights that rounding is to come close to, exactly zero where they are pruned.  float32 [out, in]"""
    if layer.mask is not None:
        return layer.current.masked_fill(~layer.mask, 0.0)
    return layer.current if layer.V is not None or layer.aim is None else layer.aim

"""Sums of products over tokens in float32, of which calibration makes most of its time: S += xᵀx and S += xᵀy.

On the CPU by generated code (`llvm.gram`), on a GPU and where that does not run by torch: xᵀx in panels, which is half
the arithmetic of the whole product.  With HFQUANT_EXPLAIN=1 it is said on stderr which of them runs, and why.
"""

import warnings

import torch
from torch import Tensor

from ..errors import ShapeError
from ..llvm import BROKEN, refused
from .kernels import explain

PANELS = 8


def add_gram(S: Tensor, x: Tensor) -> None:
    """S += xᵀx on and below the diagonal; what is above is left undefined.

    x [tokens, n] of any floating type, S float32 [n, n].  Raises ShapeError.
    """
    _check(S, x, x)
    if _generated(S, x, None):
        return
    x, n = x.float(), x.shape[1]
    panel = max(64, -(-n // PANELS))
    for a in range(0, n, panel):
        b = min(a + panel, n)
        S[a:, a:b].addmm_(x[:, a:].T, x[:, a:b])


def add_product(S: Tensor, x: Tensor, y: Tensor) -> None:
    """S += xᵀy.  x [tokens, n] and y [tokens, m] of any floating types, S float32 [n, m].  Raises ShapeError."""
    _check(S, x, y)
    if x.dtype != y.dtype:
        x, y = x.float(), y.float()
    if not _generated(S, x, y):
        S.addmm_(x.float().T, y.float())


def _generated(S: Tensor, x: Tensor, y: Tensor | None) -> bool:
    """Let generated code do it; False if there is none here.  If it cannot be made, that is said once, S as it was."""
    reason = refused(S, x, y) or (None if S.is_contiguous() else "the sum is not contiguous")
    if reason:
        explain(f"hfquant: sums over tokens by torch: {reason}")
        return False
    from .llvm import gram

    if x.dtype not in gram.TYPES:
        x, y = x.float(), None if y is None else y.float()
    try:
        gram.prepare(x.dtype)
    except (RuntimeError, OSError) as error:
        BROKEN.append(f"their code could not be made: {str(error).splitlines()[0]}")
        warnings.warn(f"hfquant: generated loops are not used any more: {BROKEN[0]}", RuntimeWarning, stacklevel=3)
        return False
    explain(f"hfquant: sums over tokens by generated code ({gram.best().name})")
    gram.add(S, x, y)
    return True


def _check(S: Tensor, x: Tensor, y: Tensor) -> None:
    fits = x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0] and S.shape == (x.shape[1], y.shape[1])
    fits = fits and S.device == x.device == y.device
    if not (fits and S.dtype == torch.float32 and x.is_floating_point() and y.is_floating_point()):
        given = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in (S, x, y))
        hint = "S is float32 [n, m], x [tokens, n] and y [tokens, m], on one device"
        raise ShapeError(f"a sum over tokens was given S, x, y: {given}", hint)

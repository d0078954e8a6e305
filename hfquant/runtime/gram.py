"""Sums of products over tokens in float32, of which calibration makes most of its time: S += xᵀx and S += xᵀy.

On the CPU by generated code (`llvm.gram`), on a GPU and where that does not run by torch: xᵀx in panels, which is half
the arithmetic of the whole product.
"""

import warnings

import torch
from torch import Tensor

from ..llvm import BROKEN, refused
from .kernels import explain

PANELS = 8


def add_gram(S: Tensor, x: Tensor) -> None:
    """S += xᵀx on and below the diagonal; what is above is left undefined.

    x [tokens, n] of any floating type, S float32 [n, n].
    """
    if not _generated(S, x, None):
        x, n = x.float(), x.shape[1]
        panel = max(64, -(-n // PANELS))
        for a in range(0, n, panel):
            b = min(a + panel, n)
            S[a:, a:b].addmm_(x[:, a:].T, x[:, a:b])


def add_product(S: Tensor, x: Tensor, y: Tensor) -> None:
    """S += xᵀy.  x [tokens, n] and y [tokens, m] of the same floating type, S float32 [n, m]."""
    if not _generated(S, x, y):
        S.addmm_(x.float().T, y.float())


def _generated(S: Tensor, x: Tensor, y: Tensor | None) -> bool:
    """Let generated code do it; False if there is none here."""
    if reason := refused(S, x, y):
        explain(f"hfquant: sums over tokens by torch: {reason}")
        return False
    from .llvm import gram

    try:
        code = gram.compiled(gram.best(), x.dtype, y is None)
    except (RuntimeError, OSError) as error:
        BROKEN.append(f"their code could not be made: {str(error).splitlines()[0]}")
        warnings.warn(f"hfquant: generated loops are not used any more: {BROKEN[0]}", RuntimeWarning, stacklevel=3)
        return False
    explain(f"hfquant: sums over tokens by generated code ({gram.best().name})")
    gram.add(code, S, _summable(x), None if y is None else _summable(y))
    return True


def _summable(x: Tensor) -> Tensor:
    """As generated code takes it: float16 has as many bits as bfloat16, but others."""
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()

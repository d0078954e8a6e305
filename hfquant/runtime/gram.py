"""Sums of products over tokens in float32, of which calibration makes most of its time: S += xᵀx and S += xᵀy.

On the CPU by generated code (`llvm.gram`), on a GPU and where that does not run by torch: xᵀx in panels, which is half
the arithmetic of the whole product.
"""

from functools import cache

import torch
from torch import Tensor

from .kernels import explain

PANELS = 8


def add_gram(S: Tensor, x: Tensor) -> None:
    """S += xᵀx on and below the diagonal; what is above is left undefined.

    x [tokens, n] of any floating type, S float32 [n, n].
    """
    if x.device.type == "cpu" and generated():
        from .llvm import gram

        gram.add(S, _summable(x))
        return
    x, n = x.float(), x.shape[1]
    panel = max(64, -(-n // PANELS))
    for a in range(0, n, panel):
        b = min(a + panel, n)
        S[a:, a:b].addmm_(x[:, a:].T, x[:, a:b])


def add_product(S: Tensor, x: Tensor, y: Tensor) -> None:
    """S += xᵀy.  x [tokens, n] and y [tokens, m] of the same floating type, S float32 [n, m]."""
    if x.device.type == "cpu" and generated():
        from .llvm import gram

        gram.add(S, _summable(x), _summable(y))
    else:
        S.addmm_(x.float().T, y.float())


def _summable(x: Tensor) -> Tensor:
    """As generated code takes it: float16 has as many bits as bfloat16, but others."""
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


@cache
def generated() -> bool:
    """Whether the code can be generated and run here."""
    try:
        from .llvm import gram

        explain(f"hfquant: sums over tokens by generated code ({gram.best().name})")
        return True
    except (ImportError, OSError) as error:
        explain(f"hfquant: sums over tokens by torch: {error}")
        return False

"""Weights rounded to nearest, and the error the CPU kernel may make on them."""

import torch
from torch import Tensor, nn

from hfquant.runtime.experts import QExperts
from hfquant.runtime.nn import Packed
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized


def rounded(W: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float16) -> Quantized:
    """W [out, in] on its grid."""
    scale, zero = grid.fit(W.detach().float(), dtype=scale_dtype)
    return Quantized(codes=grid.encode(W.detach().float(), scale, zero), scale=scale, zero_point=zero, grid=grid)


def random(out_features: int, in_features: int, grid: Grid, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    return rounded(torch.randn(out_features, in_features, generator=generator) + 0.2, grid)


def fill(model: nn.Module, dense: nn.Module) -> None:
    """Give the packed modules of `model` the rounded weights of their namesakes in `dense`."""
    sources = dict(dense.named_modules())
    for name, module in model.named_modules():
        source = sources[name]
        if isinstance(module, QExperts):
            for param in module.packed:
                module.fill(param, [rounded(W, module.grid) for W in getattr(source, param)])
        elif isinstance(module, Packed):
            W = source.weight.T if getattr(module, "transposed", False) else source.weight
            module.fill(rounded(W, module.grid))


def bound(x: Tensor, Q: Quantized, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """How far the 4-bit kernel's y = x Ŵᵀ (+ bias) may be from the exact one.  [tokens, out]

    u = 2⁻⁸ is the largest relative error of rounding to bfloat16.  Scales are rounded: u Σ|x||Ŵ|.  At 4 bits
    so is the offset s·(8 − z) of a group: u Σ|x||s·(8 − z)|.  An x that is not bfloat16 is rounded.  The result
    is rounded, once more after the bias.  A twentieth is added for products of these and for the float32 sums.
    """
    u, columns = 2.0**-8, Q.shape[1]
    size = Q.dequantize().double().abs() * (1 if x.dtype == torch.bfloat16 else 2)
    if Q.grid.bits == 4:
        size += (Q.grid.expand(Q.scale.double() * (8 - Q.zero_point.double()), columns)).abs()
    results = y.double().abs() + (0 if bias is None else (y - bias).double().abs())
    return 1.05 * u * (x.double().abs() @ size.T + results) + 1e-6

"""A weight with everything that a recipe may give it: mask, grid, low rank, input scale, rounded inputs."""

from dataclasses import replace

import torch
from torch import Tensor

from hfquant.tensors.activations import scale_of
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.layer import Layer, LowRank, Quantized


def largest(W: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n largest of every m in a row; with m = 0 the n largest of all."""
    size = W.abs().flatten() if not m else W.abs().unflatten(1, (-1, m))
    kept = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, size.topk(n, -1).indices, True)
    return kept.view(W.shape)


def factors(residual: Tensor, rank: int) -> LowRank:
    """The truncated SVD of what rounding left, in 8 bit."""
    U, S, Vh = torch.linalg.svd(residual.float(), full_matrices=False)
    u, v = U[:, :rank], Vh[:rank]
    top = u.abs().amax(0) / 127, v.abs().amax(1) / 127
    codes = (u / top[0]).round().to(torch.int8), (v / top[1][:, None]).round().to(torch.int8)
    return LowRank(u=codes[0], v=codes[1], scale=S[:rank] * top[0] * top[1])


def encode(W: Tensor, encoding: Encoding, dtype: torch.dtype = torch.float16, reach: float = 4.0) -> Quantized:
    """W [out, in] as `encoding` says it, made by a layer the way a recipe would.

    reach: static activations are rounded for inputs within it; asymmetric ones from minus a quarter of it.
    """
    generator = torch.Generator().manual_seed(0)
    s = torch.rand(W.shape[1], generator=generator) + 0.5 if encoding.scaled_input else None
    V = W.float() if s is None else W.float() * s
    mask, pattern = None, None
    if encoding.sparsity is not None:
        n, m = encoding.sparsity.n, encoding.sparsity.m
        mask, pattern = largest(V, n, m), (n, m) if m else None
        V = V * mask
    layer = Layer(name="layer", W=W.float(), V=V, mask=mask, pattern=pattern)
    if not encoding.grid.is_float:
        scale, zero = encoding.grid.fit(V, dtype=dtype)
        codes = encoding.grid.encode(V, scale, zero)
        layer = replace(layer, Q=Quantized(codes=codes, scale=scale, zero_point=zero, grid=encoding.grid))
    if encoding.rank:
        layer = replace(layer, low_rank=factors(W * (1 if s is None else s) - layer.effective, encoding.rank))
    Q = replace(layer.stored(dtype), input_scale=s, activations=encoding.activations)
    if encoding.activations is None or encoding.activations.per != "static":
        return Q
    low = torch.tensor([-reach if encoding.activations.symmetric else -reach / 4])
    static, zero = scale_of(low, torch.tensor([reach]), encoding.activations)
    return replace(Q, activation_scale=static, activation_zero=None if encoding.activations.symmetric else zero)

import torch
from torch import Tensor
from dataclasses import replace
from ._obs import damped
from ._refine import refine


def step(Q, G: Tensor, b: Tensor, H: Tensor, lam: float, damp: float, rounds: int):
    """Q; G [out,in] gradient of the loss wrt effective weight; b [out] curvature per row; H [in,in]"""
    Hd = damped(H, damp)
    L = torch.linalg.cholesky(Hd)
    g = (G.double() / (b.double()[:, None] * (1 + lam)).clamp(min=1e-30)).T
    W = Q.dequantize() - torch.cholesky_solve(g, L).T.float()
    return refine(Q, W, Hd.float(), rounds=rounds, mask=Q.mask)

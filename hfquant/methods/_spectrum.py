"""The directions in which a matrix is largest."""

import numpy
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

DENSE = 512  # a full decomposition is quicker up to this size


def leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` left singular vectors of M, and what is left of ‖M‖² after 0, 1 .. rank of them.

    M float64 [out, in] -> [out, rank], [rank + 1].  From the eigenvectors of M Mᵀ or MᵀM, whichever is smaller: float64
    leaves eight digits of the singular values, which is more than 8-bit factors can tell.
    """
    out, n = M.shape
    wide = out <= n
    values, vectors = _top(M @ M.T if wide else M.T @ M, rank)
    A = vectors if wide else torch.linalg.qr(M @ vectors).Q
    left = M.square().sum() - torch.cat([torch.zeros(1, dtype=M.dtype), values.clamp(min=0).cumsum(0)])
    return A, left.clamp(min=0)


def _top(G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, descending, and their vectors as columns."""
    if G.shape[0] > DENSE and rank <= G.shape[0] // 8:
        try:
            start = numpy.random.default_rng(0).standard_normal(G.shape[0])  # fixed: the same bytes every time
            values, vectors = eigsh(G.numpy(), k=rank, v0=start)
            order = values.argsort()[::-1].copy()
            return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])
        except ArpackError:
            pass  # not converged: the full decomposition below always is
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]

"""Orthogonal matrices that spread every channel over all: Hadamard's, of any size that one is easily made of.

H Hᵀ = n I with entries ±1.  Sylvester (1867) doubles one: [[H, H], [H, −H]].  Paley (1933) makes one of the quadratic
residues χ modulo a prime q: of size q + 1 where q ≡ 3 (mod 4), of size 2 (q + 1) where q ≡ 1.
"""

import math

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor:
    """Hadamard's matrix of size n over √n; where there is none of that size here, cosines take the part of the odd
    factor.  float64 [n, n], symmetric where n is a power of two
    """
    halves = (n & -n).bit_length() - 1  # how often 2 divides n
    for doubled in range(halves, -1, -1):
        core = _paley(n >> doubled)
        if core is not None:
            return _double(core, doubled) / n**0.5
    return _double(_cosines(n >> halves), halves) / 2 ** (halves / 2)


def spreading(n: int, seed: int = 0) -> Tensor:
    """Orthogonal Q, float64 [n, n], that spreads every channel but the mean over all channels: 1 Q = 1.

    Hadamard's with random signs, and a reflection that brings the mean back.  So what subtracts the mean of x, as
    LayerNorm does, does the same to x Q.
    """
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    R = signs[:, None] * hadamard(n)
    mean = torch.full((n,), n**-0.5, dtype=torch.float64)
    moved = mean @ R
    axis = moved - mean
    if float(axis.norm()) < 1e-9:
        return R
    axis /= axis.norm()
    return R - 2 * torch.outer(R @ axis, axis)


def _double(H: Tensor, times: int) -> Tensor:
    for _ in range(times):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def _paley(n: int) -> Tensor | None:
    """Of entries ±1, by Paley's first or second construction; [[1]] for 1."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 4:
        return None
    if (n - 1) % 4 == 3 and _is_prime(n - 1):
        C = _residues(n - 1)
        C[1:, 0] = -1
        return C + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        one, other = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
        return torch.kron(_residues(q), one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)
    return None


def _residues(q: int) -> Tensor:
    """[[0, 1ᵀ], [1, χ(i − j)]], [q + 1, q + 1]"""
    chi = -torch.ones(q, dtype=torch.float64)
    chi[torch.arange(1, q).square() % q] = 1
    chi[0] = 0
    at = torch.arange(q)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:], C[1:, 0] = 1, 1
    C[1:, 1:] = chi[(at[:, None] - at) % q]
    return C


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _cosines(n: int) -> Tensor:
    """The orthogonal cosine transform, [n, n]."""
    k = torch.arange(n, dtype=torch.float64)
    C = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * (2 / n) ** 0.5
    C[0] /= 2**0.5
    return C

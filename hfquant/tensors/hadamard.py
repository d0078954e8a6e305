"""Hadamard matrices, and random rotations that are made of them and cost n log n instead of n².

A Hadamard matrix has entries ±1 and orthogonal rows, so over √n it is a rotation that spreads a single large channel
evenly over all others.  Sylvester's exist for powers of two, Paley's (1933) for p + 1, p prime and 3 modulo 4, and for
2(p + 1), p prime and 1 modulo 4.  The Kronecker product of two is a third, which is how n = 576 has one: 36 · 16.
Where nothing fits (n = 90), what is odd of n is turned by Hartley's matrix cos(2πij/n) + sin(2πij/n), whose entries are
at most √2 times as large as a flat one's.
"""

import math
from dataclasses import dataclass

import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor

LARGEST = 64  # of the powers of two that are multiplied as one matrix


def factors(n: int) -> list[int]:
    """Orders whose product is n: first the one that is no power of two, if there must be one, then powers of two."""
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    found: list[int] = []
    if odd > 1:
        k = next((k for k in range(2, twos + 1) if _paley(odd << k) is not None), 0)
        found, twos = [odd << k], twos - k
    while twos > 0:
        step = min(twos, LARGEST.bit_length() - 1)
        found, twos = [*found, 1 << step], twos - step
    return found


def orthogonal(n: int) -> Tensor:
    """A flat orthogonal matrix: a Hadamard matrix over √n if this file knows one of that order, else Hartley's.

    -> float64 [n, n]
    """
    if n & (n - 1) == 0:
        return torch.from_numpy(sylvester(n, dtype=float)) / math.sqrt(n)
    found = _paley(n)
    if found is not None:
        return found / math.sqrt(n)
    i = torch.arange(n, dtype=torch.float64)
    angle = 2 * math.pi * (torch.outer(i, i) % n) / n
    return (angle.cos() + angle.sin()) / math.sqrt(n)


def _paley(n: int) -> Tensor | None:
    """Paley's Hadamard matrix of order n, ±1, of his first construction or else his second; None if neither fits."""
    if n % 4 == 0 and _is_prime(n - 1) and (n - 1) % 4 == 3:
        return torch.eye(n, dtype=torch.float64) + _conference(n - 1, skew=True)
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        C = _conference(n // 2 - 1, skew=False)
        both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        ends = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(C, both) + torch.kron(torch.eye(n // 2, dtype=torch.float64), ends)
    return None


def _conference(p: int, *, skew: bool) -> Tensor:
    """Zeros on the diagonal, ±1 elsewhere, C Cᵀ = p I.  p an odd prime -> [p + 1, p + 1]"""
    squares = {i * i % p for i in range(1, p)}
    legendre = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, p)], dtype=torch.float64)
    i = torch.arange(p)
    C = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    C[0, 1:] = 1.0
    C[1:, 0] = -1.0 if skew else 1.0
    C[1:, 1:] = legendre[(i[:, None] - i) % p]
    return C


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x Qᵀ, Q orthogonal [n, n] = mirror · flips · (orthogonal matrices, one per factor of n) · signs.

    signs, flips [n], ±1.  parts: [f, f] each.  mirror: a unit vector v [n] of Householder's I − 2vvᵀ, or None.
    """

    signs: Tensor
    parts: tuple[Tensor, ...]
    flips: Tensor
    mirror: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., n], in the type of `signs`"""
        y = x * self.signs
        inner = len(self.signs)
        for part in self.parts:
            f = len(part)
            inner //= f
            y = y.reshape(-1, f) @ part.T if inner == 1 else part @ y.reshape(-1, f, inner)
        y = y.reshape(x.shape) * self.flips
        return y if self.mirror is None else y - 2 * (y @ self.mirror)[..., None] * self.mirror


def rotation(n: int, seed: int, *, keep_mean: bool = False) -> Rotation:
    """A randomized Hadamard rotation: signs drawn, then that matrix, as in QuaRot (Ashkboos et al., 2024).

    keep_mean: Q maps the vector of ones onto itself, so that the mean over the channels stays what it was.  For this
    the rotation is followed by the reflection that takes Q1 back to 1: it changes entries of O(1/√n) by O(1/n).
    """
    signs, flips = 1.0 - 2.0 * torch.randint(0, 2, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    parts = tuple(orthogonal(f) for f in factors(n))
    ones = torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    v = Rotation(signs, parts, flips)(ones) - ones
    mirror = (v / v.norm()).float() if keep_mean and float(v.norm()) > 1e-6 else None
    return Rotation(signs.float(), tuple(part.float() for part in parts), flips.float(), mirror)

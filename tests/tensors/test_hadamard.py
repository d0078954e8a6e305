"""Hadamard matrices of all orders that models have, and rotations made of them: orthogonal, flat, reproducible."""

import math

import pytest
import torch

from hfquant.tensors.hadamard import factors, orthogonal, rotation

# widths of published models, and what they have to be made of
WIDTHS = {
    64: [64], 72: [36, 2], 512: [64, 8], 576: [36, 16], 768: [12, 64], 896: [28, 32], 960: [60, 16], 1536: [12, 64, 2],
    1600: [200, 8], 2048: [64, 32], 2304: [36, 64], 2560: [20, 64, 2], 3584: [28, 64, 2], 4096: [64, 64],
    5120: [20, 64, 4], 6656: [104, 64],
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4, 64, 12, 20, 24, 28, 36, 44, 60, 76, 104, 200])
def test_a_hadamard_matrix_is_flat_and_orthogonal(n: int) -> None:
    """First construction: 12 = 11 + 1, 20, 24, 44, 60, 104, 200.  Second: 28 = 2(13 + 1), 36, 76."""
    H = orthogonal(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(H.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 25, 45, 63])
def test_what_has_no_hadamard_matrix_gets_hartleys(n: int) -> None:
    H = orthogonal(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64))
    assert n**-0.5 < float(H.abs().max()) <= math.sqrt(2 / n) + 1e-12


def test_widths_of_models_are_products_of_known_orders() -> None:
    assert {n: factors(n) for n in WIDTHS} == WIDTHS
    assert all(math.prod(factors(n)) == n for n in range(1, 300))


@pytest.mark.parametrize("keep_mean", [False, True], ids=["any", "keeps the mean"])
@pytest.mark.parametrize("n", [1, 2, 45, 64, 72, 576, 4096])
def test_a_rotation_keeps_lengths_and_angles(n: int, keep_mean: bool) -> None:
    Q = rotation(n, seed=3, keep_mean=keep_mean)
    x = torch.randn(50, n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Q(x) @ Q(x).T, x @ x.T, rtol=1e-4, atol=1e-4 * n)
    torch.testing.assert_close(Q(x.view(5, 10, n)).view(50, n), Q(x), rtol=1e-5, atol=1e-5)
    if keep_mean:
        torch.testing.assert_close(Q(x).mean(-1), x.mean(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Q(torch.ones(n)), torch.ones(n), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("keep_mean", "most"), [(False, 1.0001), (True, 2.0)])
def test_one_large_channel_is_spread_over_all(keep_mean: bool, most: float) -> None:
    """Evenly, as a Hadamard matrix does; where the mean stays, nearly so."""
    n = 768
    Q = rotation(n, seed=0, keep_mean=keep_mean)(torch.eye(n)).T
    assert float(Q.abs().max()) * n**0.5 < most
    torch.testing.assert_close(Q @ Q.T, torch.eye(n), rtol=0, atol=1e-5)


def test_the_seed_decides() -> None:
    x = torch.eye(36)
    assert torch.equal(rotation(36, 5)(x), rotation(36, 5)(x))
    assert not torch.equal(rotation(36, 5)(x), rotation(36, 6)(x))

import math

import pytest
import torch

from hfquant.measure.diagnose import statistics


def test_spread_knows_extremes_and_percentiles() -> None:
    found = statistics.spread(torch.arange(101).flip(0).view(1, 101))
    assert found == {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}


def test_mean_cosine_is_that_of_all_pairs() -> None:
    E = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    u = torch.nn.functional.normalize(E.double(), dim=1)
    pairs = (u @ u.T)[~torch.eye(40, dtype=torch.bool)]
    assert statistics.mean_cosine(E) == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert statistics.mean_cosine(torch.ones(5, 3)) == pytest.approx(1)


def test_the_plane_is_where_points_are_spread() -> None:
    flat = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 9) + 3
    origin, directions = statistics.plane(flat)
    centred = flat.double() - origin
    torch.testing.assert_close((centred @ directions).norm(), centred.norm())
    torch.testing.assert_close(directions.T @ directions, torch.eye(2, dtype=torch.float64))


def test_every_weight_is_in_the_histogram() -> None:
    W = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    W[0, 0] = 1000.0
    counts = statistics.histogram(W)
    assert counts.sum() == W.numel()
    assert counts[-1] == 1, "what is beyond the last bin is in it"


def test_a_normal_distribution_looks_like_one() -> None:
    found = statistics.shape_of(torch.randn(400, 500, generator=torch.Generator().manual_seed(0)))
    assert found["kurtosis"] == pytest.approx(3, abs=0.05)
    assert found["skewness"] == pytest.approx(0, abs=0.02)
    assert found["beyond6"] == 0
    assert math.isclose(found["std"], 1, rel_tol=0.01)
    assert 4 < found["largest"] < 6

"""The few numbers that stand for a tensor: what is kept of it, and drawn."""

import torch
from torch import Tensor

SIGMAS, BINS = 16.0, 64  # a histogram reaches so many standard deviations to either side, in so many bins
POINTS = (0.0, 0.05, 0.5, 0.95, 1.0)
NAMES = ("min", "p5", "median", "p95", "max")

Spread = dict[str, float]


def spread(x: Tensor) -> Spread:
    """The extremes of some values, their median, and what 5% lie below and above."""
    ordered = x.flatten().float().sort().values
    at = [round(p * (len(ordered) - 1)) for p in POINTS]
    return {name: float(ordered[i]) for name, i in zip(NAMES, at, strict=True)}


def shape_of(W: Tensor) -> dict[str, float]:
    """How far a weight is from a normal distribution.  W float32, any shape.

    std; kurtosis, 3 for a normal one; skewness; largest, max|w| in standard deviations; beyond6, the share of weights
    farther than six of them, 2e-9 for a normal one.
    """
    sigma = W.std().clamp(min=1e-30)
    x = ((W - W.mean()) / sigma).flatten()
    return {
        "std": float(sigma),
        "kurtosis": float(x.pow(4).mean()),
        "skewness": float(x.pow(3).mean()),
        "largest": float(W.abs().max() / sigma),
        "beyond6": float((x.abs() > 6).float().mean()),
    }


def histogram(W: Tensor) -> Tensor:
    """How many weights lie in each of BINS bins of W / std, those beyond SIGMAS in the outermost.  float64 [BINS]"""
    x = (W / W.std().clamp(min=1e-30)).flatten().clamp(-SIGMAS, SIGMAS)
    return torch.histc(x, BINS, -SIGMAS, SIGMAS).double()


def mean_cosine(E: Tensor) -> float:
    """The mean over all pairs of different rows of their cosine.  E [n, d], n > 1

    Σᵢ≠ⱼ uᵢ·uⱼ = ‖Σ u‖² − n for unit vectors u: no pair is looked at.
    """
    u = torch.nn.functional.normalize(E.double(), dim=1)
    n = len(u)
    return float((u.sum(0).square().sum() - n) / (n * (n - 1)))


def plane(E: Tensor) -> tuple[Tensor, Tensor]:
    """The plane in which some points are spread the most: its origin [d] and two directions [d, 2].  E [n, d]"""
    origin = E.double().mean(0)
    _, _, directions = torch.linalg.svd(E.double() - origin, full_matrices=False)
    two = directions[:2].T
    sign = two.gather(0, two.abs().argmax(0, keepdim=True)).sign()  # which way round is a matter of chance
    return origin, two * sign

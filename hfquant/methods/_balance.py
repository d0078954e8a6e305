"""Factors between an input and its weights such that rounding both loses least: a convex problem.

Rounding adds noise, uniform within a step of the grid.  With y = Σ_j (x_j / s_j)(s_j w_j) and s = exp u, its share of
what a layer puts out is, but for a factor 1/12,

    E(u) = Σ_t p_t a_t² · Σ_j s_j² ‖W_j‖²  +  Σ_i b_i² · Σ_t p_t Σ_j (x_tj / s_j)²,   p_t = 1 / (T ‖y_t‖²)

where a_t is the step that token t gets, the largest |x_tj| / s_j over the number of steps, and b_i that of row i, the
largest |W_ij| s_j likewise (of groups: several of either).  Every one of these four sums is log-convex in u, so E is,
and a descent from anywhere finds its least value.  SmoothQuant's equation 4 looks at the extremes alone; here counts
how often they are met, and how much goes through each channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors.activations import bounds
from ..tensors.encoding import Activations
from ..tensors.grid import Grid

ROWS = 1024  # of a weight whose steps are followed, spread over all of it
RATE = 0.1  # of Adam (Kingma & Ba, 2014) at the start, in units of u; falls to a hundredth of it
FIRST, SECOND, EPSILON = 0.9, 0.95, 1e-12
TINY = 1e-30


@dataclass(frozen=True)
class Reader:
    """A layer that reads the input.  W float32 [out, in]; activations None: its input is not rounded."""

    W: Tensor
    grid: Grid
    activations: Activations | None


class Balance:
    """The error E of all layers with a common input.

    x float32 [tokens, in]: a sample of it.  low, high [in]: the extremes of each channel over all tokens seen; they
    stand beside the sample as two tokens more, so that what the sample missed does not count for nothing.
    """

    def __init__(self, x: Tensor, low: Tensor, high: Tensor, readers: Sequence[Reader]) -> None:
        self.x, self.readers = torch.cat([x, low[None], high[None]]), readers
        self.energy = [reader.W.square().sum(0) for reader in readers]  # ‖W_j‖² [in]
        self.share = [self._share(x, r.W, e) for r, e in zip(readers, self.energy, strict=True)]
        self.through = [(self.x.square() * p[:, None]).sum(0) for p in self.share]  # Σ_t p_t x_tj² [in]
        self.rows = [reader.W[:: max(1, -(-len(reader.W) // ROWS))] for reader in readers]

    def _share(self, x: Tensor, W: Tensor, energy: Tensor) -> Tensor:
        """p_t, 0 for a token that comes to nothing.  [tokens + 2]"""
        extremes = (self.x[-2:].square() * energy).sum(1)
        y = torch.cat([(x @ W.T).square().sum(1), extremes])
        return torch.where(y > TINY, 1 / y.clamp(min=TINY), 0.0) / len(self.x)

    def error(self, u: Tensor) -> Tensor:
        """E of factors exp u, u [in]."""
        squared, total = (2 * u).exp(), u.new_zeros(())
        scaled = self.x * (-u).exp()
        for i, (W, p, h) in enumerate(zip(self.rows, self.share, self.through, strict=True)):
            reader = self.readers[i]
            if reader.activations is not None:
                a = _input_steps(scaled, reader.activations)  # [tokens, groups]
                passed = _sums(self.energy[i] * squared, _width(reader.activations, len(u)))
                total = total + (p @ a.square()) @ passed
            if not reader.grid.is_float:
                b = _weight_steps(W * u.exp(), reader.grid)  # [rows, groups]
                many = len(reader.W) / len(W)
                total = total + many * b.square().sum(0) @ _sums(h / squared, reader.grid.columns(len(u)))
        return total / len(self.readers)

    def descend(self, u: Tensor, steps: int, source: Tensor | None = None) -> Tensor:
        """Factors with a smaller E, by so many steps of Adam; u [in] -> [in].

        source int64 [in]: channels with the same source have the same factor.
        """
        free = u.clone() if source is None else _means(u, source)
        best, least = free, float("inf")
        mean, square = torch.zeros_like(free), torch.zeros_like(free)
        for step in range(steps + 1):
            with torch.enable_grad():
                at = free.detach().requires_grad_()
                E = self.error(at if source is None else at[source]).log()
                (slope,) = torch.autograd.grad(E, at)
            if float(E) < least:
                best, least = free, float(E)
            mean, square = mean.lerp(slope, 1 - FIRST), square.lerp(slope.square(), 1 - SECOND)
            size = (square / (1 - SECOND ** (step + 1))).sqrt() + EPSILON
            rate = RATE * (1 - 0.99 * step / max(1, steps))
            free = free - rate * (mean / (1 - FIRST ** (step + 1))) / size
        found = best if source is None else best[source]
        found = found - found.median()  # E does not change with a common factor
        return torch.where((self.x == 0).all(0), torch.zeros_like(found), found)


def _means(u: Tensor, source: Tensor) -> Tensor:
    """[in] -> [sources]"""
    return u.new_zeros(int(source.max()) + 1).scatter_reduce(0, source, u, "mean", include_self=False)


def _width(activations: Activations, n: int) -> int:
    return min(activations.group_size, n) if activations.per == "group" else n


def _input_steps(x: Tensor, activations: Activations) -> Tensor:
    """[tokens, in] -> [tokens, groups]"""
    bottom, top = bounds(activations)
    low, high = _extremes(x, _width(activations, x.shape[1]))
    step = torch.maximum(-low, high) / top if activations.symmetric else (high - low) / (top - bottom)
    return step if activations.per in ("token", "group") else step.amax(0, keepdim=True).expand_as(step)


def _weight_steps(W: Tensor, grid: Grid) -> Tensor:
    """[rows, in] -> [rows, groups]"""
    low, high = _extremes(W, grid.columns(W.shape[1]))
    return torch.maximum(-low, high) / grid.middle if grid.symmetric else (high - low) / grid.top


def _extremes(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of every run of so many columns, zero included; zeros fill up the last.  [n, in] -> [n, groups] twice"""
    if width < x.shape[1]:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
    runs = x.unflatten(1, (-1, width))
    return runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)


def _sums(v: Tensor, width: int) -> Tensor:
    """[in] -> [groups]"""
    return torch.nn.functional.pad(v, (0, -len(v) % width)).unflatten(0, (-1, width)).sum(1)

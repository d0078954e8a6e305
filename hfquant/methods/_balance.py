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

ROWS = 256  # of a weight, the largest ones and as many others, whose steps are followed
RATE = 0.1  # of Adam (Kingma & Ba, 2014) at the start, in units of u; falls to a hundredth of it
FIRST, SECOND, EPSILON = 0.9, 0.95, 1e-12
TINY = 1e-30


@dataclass(frozen=True)
class Reader:
    """A layer that reads the input.  W float32 [out, in]; activations None: its input is not rounded."""

    W: Tensor
    grid: Grid
    activations: Activations | None


class Steps:
    """The steps a matrix [n, in] is rounded with, one for every row and run of `width` columns, as its columns grow.

    A symmetric grid has `levels` on one side of zero, an asymmetric one on both together.  pooled: all rows share the
    largest.
    """

    def __init__(self, M: Tensor, width: int, levels: int, symmetric: bool, pooled: bool = False) -> None:
        self.width, self.levels, self.pooled = width, levels, pooled
        M = torch.nn.functional.pad(M, (0, -M.shape[1] % width))
        self.sides = [M.abs()] if symmetric else [M.clamp(min=0), M.neg().clamp_(min=0)]
        self.first = torch.arange(0, M.shape[1], width, device=M.device)  # column of every run

    def at(self, factors: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """With the columns multiplied by these [in]: the steps [n, groups], and what they come from.

        The latter as pairs of columns [n, groups] and the parts of the step, which add up to it.
        """
        factors = torch.nn.functional.pad(factors, (0, -len(factors) % self.width))
        parts = []
        for side in self.sides:
            top, at = (side * factors).unflatten(1, (-1, self.width)).max(-1)
            parts.append((at + self.first, top / self.levels))
        step = sum((part for _, part in parts[1:]), parts[0][1])
        if self.pooled:
            row = step.argmax(0)[None]
            step = step.gather(0, row).expand_as(step)
            parts = [(at.gather(0, row).expand_as(at), part.gather(0, row).expand_as(part)) for at, part in parts]
        return step, parts

    def sums(self, v: Tensor) -> Tensor:
        """Of every run of columns.  [in] -> [groups]"""
        return torch.nn.functional.pad(v, (0, -len(v) % self.width)).unflatten(0, (-1, self.width)).sum(1)

    def spread(self, v: Tensor, n: int) -> Tensor:
        """[groups] -> [in]"""
        return v.repeat_interleave(self.width)[:n]


class Balance:
    """The error E of all layers with a common input.

    x float32 [tokens, in]: a sample of it.  low, high [in]: the extremes of each channel over all tokens seen; they
    stand beside the sample as two tokens more, so that what the sample missed does not count for nothing.
    """

    def __init__(self, x: Tensor, low: Tensor, high: Tensor, readers: Sequence[Reader]) -> None:
        self.x = torch.cat([x, low[None], high[None]])
        self.inputs: dict[Activations, tuple[Steps, list[tuple[Tensor, Tensor]]]] = {}
        self.weights: list[tuple[Steps, Tensor, Tensor]] = []
        for reader in readers:
            energy = reader.W.square().sum(0)  # ‖W_j‖² [in]
            p = self._share(x, reader.W, energy) / len(readers)
            if (how := reader.activations) is not None:
                steps = self.inputs.get(how) or (_of_inputs(self.x, how), [])
                steps[1].append((p, energy))
                self.inputs[how] = steps
            if not reader.grid.is_float:
                rows, counts = _some_rows(reader.W)
                through = (self.x.square() * p[:, None]).sum(0)  # Σ_t p_t x_tj² [in]
                self.weights.append((_of_weights(reader.W[rows], reader.grid), counts, through))

    def _share(self, x: Tensor, W: Tensor, energy: Tensor) -> Tensor:
        """p_t, 0 for a token that comes to nothing.  [tokens + 2]"""
        extremes = (self.x[-2:].square() * energy).sum(1)
        y = torch.cat([(x @ W.T).square().sum(1), extremes])
        return torch.where(y > TINY, 1 / y.clamp(min=TINY), 0.0) / len(self.x)

    def error(self, u: Tensor) -> tuple[float, Tensor]:
        """E of factors exp u, and its gradient.  u [in] -> [in]"""
        s, slope, total, n = u.exp(), torch.zeros_like(u), u.new_zeros(()), len(u)
        squared = s.square()
        for inputs, readers in self.inputs.values():
            a, parts = inputs.at(1 / s)
            push = torch.zeros_like(a)  # dE / d(a²) of every step
            for p, energy in readers:
                passed, noise = inputs.sums(energy * squared), p @ a.square()  # [groups]
                total += noise @ passed
                slope += 2 * inputs.spread(noise, n) * energy * squared
                push += p[:, None] * passed
            _credit(slope, parts, -2 * push * a)
        for weights, counts, through in self.weights:
            b, parts = weights.at(s)
            passed, noise = weights.sums(through / squared), counts @ b.square()
            total += noise @ passed
            slope -= 2 * weights.spread(noise, n) * through / squared
            _credit(slope, parts, 2 * counts[:, None] * passed * b)
        return float(total), slope

    def descend(self, u: Tensor, steps: int, source: Tensor | None = None) -> Tensor:
        """Factors with a smaller E, by so many steps of Adam on log E.  u [in] -> [in]

        source int64 [in]: channels with the same source have the same factor.
        """
        free = u if source is None else _pooled(u, source, "mean")
        best, least = free, float("inf")
        mean, square = torch.zeros_like(free), torch.zeros_like(free)
        for step in range(steps + 1):
            E, slope = self.error(free if source is None else free[source])
            if least > E:
                best, least = free, E
            slope = (slope if source is None else _pooled(slope, source, "sum")) / max(E, TINY)
            mean, square = mean.lerp(slope, 1 - FIRST), square.lerp(slope.square(), 1 - SECOND)
            size = (square / (1 - SECOND ** (step + 1))).sqrt() + EPSILON
            rate = RATE * (1 - 0.99 * step / max(1, steps))
            free = free - rate * (mean / (1 - FIRST ** (step + 1))) / size
        found = best if source is None else best[source]
        found = found - found.median()  # E does not change with a common factor
        return torch.where((self.x == 0).all(0), torch.zeros_like(found), found)


def _some_rows(W: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that stand for all, and for how many each does: the few that are largest stand for themselves."""
    order = W.abs().amax(1).argsort(descending=True)
    rest = order[ROWS:]
    some = rest[:: max(1, len(rest) // ROWS)]
    counts = W.new_ones(min(ROWS, len(order)) + len(some))
    counts[ROWS:] = len(rest) / max(1, len(some))
    return torch.cat([order[:ROWS], some]), counts


def _credit(slope: Tensor, parts: list[tuple[Tensor, Tensor]], force: Tensor) -> None:
    """Add what moving the columns that the steps come from would change.  force [n, groups]: per part of a step"""
    for at, part in parts:
        inside = at < len(slope)  # a run of nothing but padding comes from no column
        slope.index_add_(0, at[inside], (force * part)[inside])


def _pooled(v: Tensor, source: Tensor, how: str) -> Tensor:
    """[in] -> [sources]"""
    return v.new_zeros(int(source.max()) + 1).scatter_reduce(0, source, v, how, include_self=False)


def _of_inputs(x: Tensor, how: Activations) -> Steps:
    n, (bottom, top) = x.shape[1], bounds(how)
    width = min(how.group_size, n) if how.per == "group" else n
    levels = top if how.symmetric else top - bottom
    return Steps(x, width, levels, how.symmetric, pooled=how.per not in ("token", "group"))


def _of_weights(W: Tensor, grid: Grid) -> Steps:
    return Steps(W, grid.columns(W.shape[1]), grid.middle if grid.symmetric else grid.top, grid.symmetric)

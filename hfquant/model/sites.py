"""Who makes what a layer reads: the kinds of makers that can be rescaled exactly, and how they are recognized."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Weight
from .trace import apart

TOLERANCE = 1e-4  # relative, in float32: rounding stays below 1e-5, what is not exact comes out above 1e-2


@dataclass(frozen=True)
class Norm:
    """A norm that computes normalized · (offset + weight) + bias."""

    module: str
    offset: float


@dataclass(frozen=True, eq=False)
class Rows:
    """An earlier layer: channel j of the input comes from its row rows[j].  rows int64 [in]"""

    weight: Weight
    rows: Tensor

    def tie(self, s: Tensor) -> Tensor:
        """Factors such that channels made by the same row (of heads that share a value) have the same: the largest."""
        return self.of_rows(s)[self.rows]

    def views(self, block: nn.Module) -> list[Tensor]:
        """Its weight [out, in] and, if it has one, its bias [out]."""
        bias = getattr(block.get_submodule(self.weight.module), "bias", None)
        return [self.weight.get(block)] + ([] if bias is None else [bias.data])

    def of_rows(self, s: Tensor) -> Tensor:
        """[in] -> [rows up to the last that is used]"""
        return torch.zeros(int(self.rows.max()) + 1).scatter_reduce_(0, self.rows, s.float(), "amax")


@dataclass(frozen=True, eq=False)
class Site:
    """Layers that read the same tensor, and what makes it, if that can be rescaled exactly.

    outer: the tensor is what the block was given, or a norm's output, not something between its layers.
    """

    members: tuple[Weight, ...]
    maker: Norm | Rows | None
    outer: bool

    @property
    def name(self) -> str:
        return self.members[0].module


def parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def measured_offset(module: nn.Module, width: int) -> float | None:
    """The c of a norm that computes normalized · (c + weight) + bias, measured; None if it computes otherwise."""
    names = {name for name, _ in parameters(module)}
    if not names <= {"weight", "bias"} or module.get_parameter("weight").shape != (width,):
        return None
    weight, x = module.get_parameter("weight"), torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    x, kept, outputs = x.to(weight), weight.data.clone(), []
    bias = getattr(module, "bias", None)
    for value in (0.0, 1.0, 3.0):
        weight.data.fill_(value)
        outputs.append(module(x).float() - (0 if bias is None else bias.float()))
    weight.data.copy_(kept)
    at0, at1, at3 = outputs
    unit = at1 - at0
    if apart(at3 - at0, 3 * unit) > TOLERANCE:
        return None
    offset = round(float((at0 * unit).sum() / unit.square().sum().clamp(min=1e-30)))
    return float(offset) if (at0 - offset * unit).norm() < TOLERANCE * unit.norm() else None


def matching_rows(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """For every channel of x [samples, in] the channel of y [samples, out] with the same values, int64 [in].

    The first token of a causal model attends to itself alone: what o reads there is what v wrote, whatever the order
    of heads, and however often one is used.
    """
    if x is None or y is None or x.shape[0] != y.shape[0]:
        return None
    order = y[0].argsort()
    at = torch.searchsorted(y[0][order].contiguous(), x[0].contiguous()).clamp(max=len(order) - 1)
    rows = torch.stack([order[at], order[(at - 1).clamp(min=0)]])  # the nearest above and below
    nearest = (y[0][rows] - x[0]).abs().argmin(0)
    found = rows.gather(0, nearest[None])[0].cpu()
    return found if apart(y[:, found], x) < TOLERANCE else None

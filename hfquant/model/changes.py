"""What can be done to the input of a site without changing what the block computes: rescale it, or turn it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .sites import Norm, Rows, Site, parameters

Edit = tuple[Tensor, Tensor]  # a view of a parameter, and its new values


class Change(Protocol):
    """edits: of the members' columns and of what makes their input; back: their new input [.., in] -> the old one."""

    def edits(self, block: nn.Module) -> Iterator[Edit]: ...

    def back(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Scaling:
    """x becomes x / s, s [in] > 0."""

    site: Site
    s: Tensor

    def back(self, x: Tensor) -> Tensor:
        return x * self.s.to(x.device)

    def edits(self, block: nn.Module) -> Iterator[Edit]:
        maker = self.site.maker
        for member in self.site.members:
            W = member.get(block)
            yield W, W * self.s.to(W.device)
        if isinstance(maker, Norm):
            for name, p in parameters(block.get_submodule(maker.module)):
                shift = maker.offset if name == "weight" else 0.0
                yield p.data, (p.data + shift) / self.s.to(p.device) - shift
        elif isinstance(maker, Rows):
            r = maker.of_rows(self.s.cpu())
            for view in maker.views(block):
                own = torch.where(r == 0, torch.ones_like(r), r).to(view.device)
                part = view[: len(r)]
                yield part, part / (own[:, None] if view.ndim == 2 else own)


@dataclass(frozen=True)
class Turning:
    """Each run of b channels is multiplied by R, orthogonal [b, b]: x becomes x Rᵀ.  The maker must be `Rows`."""

    site: Site
    R: Tensor

    def back(self, x: Tensor) -> Tensor:
        return self._runs(x, self.R)

    def _runs(self, x: Tensor, R: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(R))) @ R.to(x)).flatten(-2)

    def edits(self, block: nn.Module) -> Iterator[Edit]:
        for member in self.site.members:
            W = member.get(block)
            yield W, self._runs(W, self.R.T)
        assert isinstance(self.site.maker, Rows)
        runs = self.site.maker.rows.view(-1, len(self.R)).unique(dim=0)  # heads that share a value share its rows
        for view in self.site.maker.views(block):
            turned = view.clone()
            for rows in runs.to(view.device):
                turned[rows] = self.R.to(view) @ view[rows]
            yield view, turned

"""Token embeddings and output head: what a residual in a row of their table moves.

    embeddings  the gradients of all places of a sequence where a token stands add up, and so do its row's residuals:
                F = Σ over sequences of (Σₜ gₜ)²
    head        F = Σₜ g² h², row by row: g is p − 1 for the token drawn, and p for all others

Both are rounded to nearest, see `compress.ends`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .moments import Sums
from .outside import Ends

LOOKED_UP = 1024  # rows of the head's table that are looked at


@dataclass
class Tables(Ends):
    """places: how many tokens are drawn in all."""

    places: int
    _embedded: dict[int, Tensor] = field(default_factory=dict)  # token -> F [dim]
    _head: Sums | None = None

    def embedded(self, module: nn.Module, ids: Tensor, gradient: Tensor) -> None:
        for row, g in zip(ids.reshape(len(gradient), -1), gradient.float(), strict=True):
            tokens, at = row.unique(return_inverse=True)
            G = torch.zeros(len(tokens), g.shape[-1]).index_add_(0, at, g.reshape(-1, g.shape[-1])).square_()
            for token, F in zip(tokens.tolist(), G, strict=True):
                self._embedded[token] = self._embedded[token] + F if token in self._embedded else F.clone()

    def head(self, module: nn.Module, h: Tensor, gradient: Tensor) -> None:
        g, h = gradient.detach().reshape(-1, gradient.shape[-1]), h.float().reshape(-1, h.shape[-1])
        energy = torch.cat([part.float().square().sum(0) for part in g.split(4096, 1)])
        if self._head is None:
            rows = energy.argsort(descending=True)[:LOOKED_UP].sort().values
            self._head = Sums(rows, torch.zeros(len(rows), h.shape[1]), torch.zeros(len(energy)), self.places)
        self._head.b += energy
        self._head.F += g[:, self._head.rows].float().square().T @ h.square()

    def of_embeddings(self, rows: int) -> Sums | None:
        """Of a table with so many rows.  None where no token was looked up."""
        if not self._embedded:
            return None
        tokens = sorted(self._embedded, key=lambda token: -float(self._embedded[token].sum()))
        b = torch.zeros(rows)
        for token, F in self._embedded.items():
            b[token] = F.sum()
        some = sorted(tokens[:LOOKED_UP])
        return Sums(torch.tensor(some), torch.stack([self._embedded[token] for token in some]), b, self.places)

    def of_head(self) -> Sums | None:
        return self._head

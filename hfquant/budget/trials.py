"""Losses of candidates that prune or compensate, which are run: on the rows of a weight that are looked at.

What a method makes of a weight, ΔW, is brought into the coordinates in which errors are independent: the residuals r
of ΔW = r M that GPTQ would have carried on to the same, see `moments`.  What a correction of rank k takes of them is
the share of ‖ΔW X‖² that its k directions hold (`methods.lorc`), for which all rows of the weight are needed.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..methods import Method
from ..methods._spectrum import leading
from ..recipe import GridSpec
from ..recipe_budget import Share
from ..tensors.layer import Layer
from .candidates import Candidate
from .moments import Sums
from .scores import Spread, rounded

# A step that aims at the original model's outputs makes up, in every layer, for a part of what the layers before have
# lost.  With `match_original` 0.5 measured losses were 0.8 of the sum of the layers' own, with rounding to nearest 1.0,
# both judged by the text that was learned from (docs/budget.md); in between it is taken to be linear.
MADE_UP = 0.4


@dataclass
class Trials:
    """W float32 [rows, in]: those rows that `sums` looks at, or, with `whole`, all.  H [in, in].  step: that rounds.
    dtype: of scales.  most: the largest rank."""

    W: Tensor
    sums: Sums
    H: Tensor
    spread: Spread | None
    step: Method
    dtype: torch.dtype
    whole: bool
    most: int
    _pruned: dict[Share, Layer] = field(default_factory=dict)
    _found: dict[tuple[Share | None, GridSpec], tuple[float, Tensor]] = field(default_factory=dict)

    def loss(self, option: Candidate) -> float:
        """KL, nats per token."""
        assert option.grid is not None
        key = option.sparsity, option.grid
        if key not in self._found:
            self._found[key] = self._tried(option.grid, option)
        loss, left = self._found[key]
        return loss * float(left[option.rank] / left[0]) if option.rank else loss

    def _tried(self, spec: GridSpec, option: Candidate) -> tuple[float, Tensor]:
        """The loss without a correction, and what is left of ‖ΔW X‖² with 0, 1, 2 .. ranks."""
        if option.sparsity is None:
            r = rounded(self.W, self.H.diagonal(), spec.grid(), self.step, self.dtype)
        else:
            done = self.step(self._without(option), spec.grid(), self.dtype)
            error = self.W - done.effective
            r = error if self.spread is None else self.spread.residuals(error)
        made_up = MADE_UP * float(getattr(self.step, "match_original", 0.0))
        loss = (1 - made_up) * self.sums.loss(r[self.sums.rows] if self.whole else r)
        if not self.most:
            return loss, torch.ones(1)
        seen = r if self.spread is None else r / self.spread.diagonal
        return loss, leading(seen.double(), min(self.most, *seen.shape))[1].clamp(min=1e-30)

    def _without(self, option: Candidate) -> Layer:
        """The weights without what is pruned."""
        assert option.sparsity is not None
        if option.sparsity not in self._pruned:
            method = option.pruning
            assert method is not None
            layer = Layer(name="", W=self.W, H=self.H)
            self._pruned[option.sparsity] = method(layer, GridSpec(bits=16).grid(), self.dtype)
        return self._pruned[option.sparsity]

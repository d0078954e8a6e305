"""A dense output layer that is multiplied in fewer bits: a run-time choice, of which nothing is stored.

Of a small model the head is a large part of what a token reads: 28 of the 135 million weights of SmolLM2, twice as many
bytes as all others together at 4 bits.  The parameter stays what it is, tied to the embedding or not, and is what is
saved, trained and moved; a rounded copy of it serves few rows on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..tensors.grid import Grid
from ..tensors.layer import Quantized
from . import cache, kernels
from .kernels import _tiles
from .nn import direct

GROUP = 64
BITS = range(4, 9)
CHUNK = 1 << 22  # weights rounded at a time


class RoundedHead(nn.Linear):
    """nn.Linear, but for few rows on a CPU, where nobody watches.  x [..., in] -> [..., out] in x's dtype.

    Its weight is rounded to nearest in groups of 64 columns, x to 8 bit unless HFQUANT_KERNELS is `exact`.
    """

    head_bits: int

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not torch.compiler.is_compiling() and self._takes(x):
            derived = cache.entry([weight]).derived
            bound = derived.get(kernels.place(x))
            if bound is None:
                bound = derived[kernels.place(x)] = self._bound(x)
            y: Tensor = bound(x, bias)
            return y
        return F.linear(x, weight, bias)

    def _takes(self, x: Tensor) -> bool:
        weight, bias = self.weight, self.bias
        return (
            x.device.type == weight.device.type == "cpu"
            and x.dtype == weight.dtype
            and x.dtype in _tiles.TYPES
            and 0 < x.numel() <= kernels.FEW * x.shape[-1]
            and x.is_contiguous()
            and not weight.is_inference()
            and not (torch.is_grad_enabled() and weight.requires_grad)
            and direct(x, bias)
            and kernels.current() in ("auto", "exact")
            and not torch.is_autocast_enabled("cpu")
        )

    def _bound(self, x: Tensor) -> kernels.Bound:
        from .llvm import layout

        entry, grid, real = cache.entry([self.weight]), Grid(self.head_bits, GROUP, True), kernels.current() == "exact"
        how = layout.Preparation.of(grid, self.in_features, None, real)
        held = entry.derive(
            (_tiles.TILES, self.head_bits),
            lambda: layout.Tiles(rounded(self.weight.detach(), grid), _tiles.prepared(), how),
        )
        kernels.explain(f"hfquant: the head {self.out_features}x{self.in_features}, dense, runs as {grid}")
        return _tiles.plan()(layout.Tiled(held, how), x.shape, x.dtype)


def rounded(W: Tensor, grid: Grid) -> Quantized:
    """W [out, in] on its grid, some rows at a time."""
    found = []
    for rows in W.split(max(1, CHUNK // W.shape[1])):
        scale, zero = grid.fit(rows.float())
        found.append((grid.encode(rows.float(), scale, zero), scale, zero))
    codes, scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Quantized(codes=codes, scale=scale, zero_point=zero, grid=grid)


def use_head(model: PreTrainedModel, bits: int | None) -> str | None:
    """From now on the model's head is multiplied in so many bits, 4 to 8, where that is possible; None: as it is.

    Returns why it is not possible here, None if it is: a head that is compressed already, or none; a machine without
    generated code.  HFQUANT_EXPLAIN=1 says so too.  Raises RecipeError for bits that are not offered.
    """
    head: Any = model.get_output_embeddings()
    if bits is None:
        if type(head) is RoundedHead:
            cache.forget([head.weight])
            _become(head, nn.Linear)
        return None
    if bits not in BITS:
        raise RecipeError(f"a head of {bits} bits is not offered", f"choose {BITS[0]} to {BITS[-1]}")
    reason = _refused(head)
    if reason is not None:
        kernels.explain(f"hfquant: the head stays as it is: {reason}")
        return reason
    if type(head) is RoundedHead:
        cache.forget([head.weight])
    _become(head, RoundedHead)
    head.head_bits = bits
    return None


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change what it runs; hooks, ties and names stay."""
    module.__class__ = kind


def _refused(head: nn.Module | None) -> str | None:
    if type(head) not in (nn.Linear, RoundedHead):
        return f"it is no dense linear layer ({type(head).__name__})"
    return _tiles.missing()

"""SparseGPT (Frantar & Alistarh, 2023; arXiv:2301.00774).

Prune the columns of W one by one; spread what each loses over the columns still to come, so that ‖WX − VX‖² grows as
little as possible.  H = XXᵀ over the calibration tokens.  Which weights go is decided on the way, block of columns by
block, by w² / U_jj²: what the layer loses if this one goes and the columns to come make up for it.

Beside the paper's algorithm: a search of the mask that starts from the sweep's (`admm`), the least-squares weights on
that mask, where a sweep can make up to the right only (`refit`), and a target that makes up for what the layers before
have lost already.  With `joint` the kept weights are rounded too.

The textbook is `admm: 0, refit: 0, match_original: 0, true_sequential: false`; `joint` then prunes and rounds in one
sweep, later masks seeing earlier roundings, as the paper does.  Otherwise the kept weights are rounded by GPTQ once
they are final, which loses less.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ..tensors.encoding import Encoding
from ..tensors.grid import Grid
from ..tensors.layer import Layer
from . import _admm, gptq
from ._mask import Places, read_pattern
from ._obs import damped, inverse_factor
from ._prune import Rounding, prune
from ._refine import objective
from ._refit import least_squares
from ._streams import Observed
from ._target import aimed, wanted

PARTS = 16  # of `sparsity`: how finely `max_error` is met
EXPERT = re.compile(r"\[\d+\]$")  # which one of fused experts a weight is


class Method(Observed):
    """Options of SparseGPT."""

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="share of a layer's weights that are pruned, wherever; or else `pattern`"
    )
    pattern: str | None = Field(None, description="`2of4`: two of every four weights in a row are kept")
    joint: bool = Field(False, description="round the kept weights too, to the recipe's grid")
    ratios: dict[str, float] = Field(
        default_factory=dict,
        description="glob of layer names, or role such as `@blocks:0:4` -> its own `sparsity`, 0 = not pruned, with"
        " `pattern` 0 alone; the first that matches decides",
    )
    max_error: float | None = Field(
        None, gt=0, description="of the layer's output, relative: a layer that would lose more is pruned less"
    )
    damp: float = Field(0.01, ge=0, le=1, description="λ as a fraction of mean(diag H); grows by itself where needed")
    block: int = Field(128, ge=1, description="columns of the sweep that have the same `sparsity`")
    admm: int = Field(8, ge=0, description="steps of the search for a better mask; 0 = the sweep's")
    refit: int = Field(8, ge=0, description="steps of least squares on the mask, at most; 0 = the sweep's weights")

    kind: ClassVar[str] = "prune"
    by_layer: ClassVar[tuple[str, ...]] = ("ratios",)
    needs_hessian: ClassVar[bool] = True

    @field_validator("pattern", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError("YAML reads `2:4` as a number: write `2of4`")
        return "{}of{}".format(*read_pattern(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either `sparsity`, e.g. 0.5, or `pattern`, e.g. 2of4")
        if self.pattern and (any(self.ratios.values()) or self.max_error is not None):
            raise ValueError(
                "`ratios` and `max_error` go with `sparsity`: a pattern is the same in every layer, or left out (0)"
            )
        if wrong := [ratio for ratio in self.ratios.values() if not 0 <= ratio < 1]:
            raise ValueError(f"`ratios` lie between 0 and 1, not {wrong[0]:g}; 0 leaves a layer unpruned")
        return self

    @classmethod
    def shorthand(cls, what: str) -> dict[str, Any]:
        """`2of4`, or `50` for half of the weights."""
        if "of" in what:
            return {"pattern": "{}of{}".format(*read_pattern(what))}
        try:
            percent = float(what)
        except ValueError:
            percent = 0.0
        if not 1 <= percent < 100:
            raise ValueError("write `2of4`, or how many percent are pruned, e.g. `sparsegpt-50`")
        return {"sparsity": percent / 100}

    def places(self, module: str) -> Places:
        """What is kept of the layer of that name."""
        name = EXPERT.sub("", module).removesuffix(".weight")
        ratio = next((ratio for glob, ratio in self.ratios.items() if fnmatchcase(name, glob)), self.sparsity)
        if ratio is None and self.pattern:
            return Places(pattern=read_pattern(self.pattern))
        return Places(sparsity=ratio or 0.0)

    @property
    def rowwise(self) -> bool:
        """Rows share a budget unless there is a pattern, which a layer among those with the same inputs may lack."""
        return self.pattern is not None and not self.ratios

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if the rows of a weight [out, in] end inside the pattern."""
        pattern = self.places("").pattern
        if pattern and shape[1] % pattern[1]:
            raise ValueError(f"{shape[1]} columns are not whole patterns of {pattern[1]}")

    @property
    def experts(self) -> bool:
        """Experts are stored together, as many weights of each."""
        return self.pattern is not None

    def encodes(self, encoding: Encoding, shape: tuple[int, int]) -> Encoding:
        """How a weight [out, in] will be stored, as far as it is known before any work."""
        places = self.places("")
        return replace(encoding, sparsity=places.stored(shape)) if places.prunes else encoding

    def __call__(self, layer: Layer, grid: Grid, scale_dtype: torch.dtype) -> Layer:
        """Set V and mask, with `joint` Q too.

        Falls back to pruning the smallest weights (and rounding to nearest), and notes it, if H is unusable.
        """
        rounds = self.joint and not grid.is_float
        if not self.places(layer.name).prunes:
            return self._rounded(layer, grid, scale_dtype) if rounds else layer
        H = layer.H
        factor = None if H is None else inverse_factor(H, self.damp)
        if H is None or factor is None:
            layer = replace(layer, notes=(*layer.notes, "no usable Hessian: the smallest weights pruned"))
            layer = self._within(layer, lambda places: _smallest(layer, places))
            return self._rounded(layer, grid, scale_dtype) if rounds else layer
        U, damp = factor
        if damp != self.damp:
            layer = replace(layer, notes=(*layer.notes, f"damping raised to {damp:g}"))
        own = aimed(layer, U, None, self.match_original)
        Wt = wanted(own).T.contiguous()
        if rounds and not self.admm and not self.refit and self.max_error is None:
            places = self.places(layer.name)
            rounding = Rounding(Wt, U, H.diagonal(), places, self.block, grid, scale_dtype)
            layer = _pruned(own, *prune(Wt, U, places, self.block, rounding), places)
            return replace(layer, Q=rounding.quantized())
        H = damped(H, damp).float()
        layer = self._within(layer, lambda places: _pruned(own, *self._solve(Wt, U, H, places), places))
        return self._rounded(layer, grid, scale_dtype) if rounds else layer

    def _within(self, layer: Layer, attempt: Callable[[Places], Layer]) -> Layer:
        """What `attempt` makes of the layer, pruned as much as `max_error` allows."""
        places = self.places(layer.name)
        found = attempt(places)
        if self.max_error is None or found.error() <= self.max_error:
            return found
        few, many, found = 0, PARTS, layer
        while many - few > 1:
            middle = (few + many) // 2
            tried = attempt(replace(places, sparsity=places.sparsity * middle / PARTS))
            if tried.error() <= self.max_error:
                few, found = middle, tried
            else:
                many = middle
        note = f"{places.sparsity * few / PARTS:.1%} pruned instead of {places.sparsity:.1%}: more would lose too much"
        return replace(found, notes=(*found.notes, note))

    def _solve(self, Wt: Tensor, U: Tensor, H: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """The weights and which are kept, [in, out]."""
        swept, kept = prune(Wt, U, places, self.block)
        if self.admm:
            keep, Vt = _admm.search(swept, Wt, H, places.choose, self.admm)
            Vt, left = least_squares(Vt, Wt, keep, H, self.refit)
            if left.sum() < objective(swept, Wt, H).sum():
                return Vt, keep
        return least_squares(swept, Wt, kept, H, self.refit)[0] if self.refit else swept, kept

    def _rounded(self, layer: Layer, grid: Grid, scale_dtype: torch.dtype) -> Layer:
        done = gptq.Method(damp=self.damp)(layer, grid, scale_dtype)
        return replace(done, notes=tuple(dict.fromkeys(done.notes)))


def _smallest(layer: Layer, places: Places) -> Layer:
    """Without its smallest weights."""
    Wt = layer.current.T
    return _pruned(layer, Wt, places.choose(Wt.abs()), places)


def _pruned(layer: Layer, Vt: Tensor, keep: Tensor, places: Places) -> Layer:
    """The layer with these weights; Vt, keep [in, out]."""
    stored = places.stored((layer.W.shape[0], layer.W.shape[1]))
    V = Vt.masked_fill(~keep, 0.0).T.contiguous()
    return replace(layer, V=V, mask=keep.T.contiguous(), pattern=(stored.n, stored.m) if stored.m else None)

"""Round to nearest, with a search for the range.

Each weight goes to the nearest value of its group's grid.  The grid need not span the group's extremes: a
narrower one clips a few large weights and rounds all the others more finely.  `search` narrower ranges are
tried and the one with the least squared error kept; where the inputs of the layer are known, each column's
error counts with diag(H), the energy of the input it multiplies.

No calibration text is needed, and a layer depends on nothing but itself: the quickest method, and the
baseline that every other has to beat.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..tensors.grid import Grid
from ..tensors.layer import Layer, Quantized
from ._target import wanted


class Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_hessian: ClassVar[bool] = False

    search: int = Field(40, ge=0, le=1000, description="narrower ranges tried per group; 0 spans the extremes")

    def __call__(self, layer: Layer, grid: Grid, scale_dtype: torch.dtype) -> Layer:
        """Set `Q` of a layer with W [out, in]; scales are stored, and used here, as `scale_dtype`.

        Zero is a value of every grid: what an earlier step pruned stays exactly zero.
        """
        W, importance = wanted(layer), None if layer.H is None else layer.H.diagonal()
        scale, zero = grid.fit(W, importance, search=self.search, dtype=scale_dtype)
        codes = grid.encode(W, scale, zero)
        return replace(layer, Q=Quantized(codes=codes, scale=scale, zero_point=zero, grid=grid))

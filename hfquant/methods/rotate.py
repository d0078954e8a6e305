"""Rotations that are fused into the weights, after QuaRot (Ashkboos et al., 2024; arXiv:2404.00456).

Of the stream.  Norms stand in front of all that reads the residual stream, and only sums write it.  So the whole model
can live in another basis, x' = Q x, with Q a randomized Hadamard matrix: every channel becomes a mean of all old ones
with signs, and the few that are many times larger than the others, which decide the scales of all inputs and of many
weights, are gone.  It reaches from the embeddings to the head, so it is done to the source, before anything is
compressed: `hfquant.model.rotation` has the equations.

Of the values.  Attention mixes tokens, not channels.  So within a head the value projection may be followed by any
orthogonal R, and the output projection preceded by its inverse:

    A (X Wᵥᵀ Rᵀ) (W_o Rᵀ)ᵀ = A X Wᵥᵀ W_oᵀ,   R = Hadamard / √n

Here spreading is no gain where the large channel is a row of Wᵥ with a scale of its own: then it spoils the others.  So
the output of the block, rounded with and without, decides.

Both cost nothing when the model runs.  QuaRot's others, in front of the down projections and on queries and keys, are
products at run time, and are not done here: the result is the architecture it was.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..model.sites import Rows, Site
from ..tensors.hadamard import orthogonal
from ._scaling import on_grid, simulated

if TYPE_CHECKING:
    from ..compress.view import BlockView
    from ..model.source import Source


class Method(BaseModel):
    """Options of the rotations."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "block"
    kind: ClassVar[str] = "rewrite"

    stream: bool = Field(True, description="the residual stream, from the embeddings to the head")
    values: bool = Field(True, description="the values within each head")
    seed: int = Field(0, ge=0, description="draws the signs of the stream's rotation")
    always: bool = Field(False, description="turn all values, not only of blocks whose rounded output comes closer")
    size: int = Field(256, ge=2, le=4096, description="values turned together at most; a head is the most there can be")

    @model_validator(mode="after")
    def _something(self) -> "Method":
        if not (self.stream or self.values):
            raise ValueError("with `stream: false` and `values: false` it does nothing")
        return self

    @property
    def needs_hessian(self) -> bool:
        """Whether text has to be run through the blocks: only to decide about values."""
        return self.values

    @property
    def rewrites(self) -> bool:
        """Whether the model as a whole changes, or only what is within its blocks."""
        return self.stream

    def rewrite(self, source: "Source") -> "Source":
        """The model whose blocks are compressed.  Raises SourceError for one that cannot be rotated."""
        from ..model.rotation import rotated

        return rotated(source, self.seed)

    def outline(self, source: "Source") -> "Source":
        """The same as far as headers tell, without reading a weight: its tensors, not what is in them."""
        from ..model.rotation import untied

        return untied(source)

    def __call__(self, view: "BlockView") -> None:
        """Turn the values of a block, in place: runs as long as stay exact, which is within a head."""
        for site in view.sites if self.values else ():
            if isinstance(site.maker, Rows):
                width = len(site.maker.rows)
                sizes = [2**k for k in range(12, 0, -1) if 2**k <= self.size and width % 2**k == 0]
                turned = next((size for size in sizes if view.folder.turn(site, hadamard(size))), None)
                if turned is not None:
                    view.folder.turn(site, hadamard(turned))  # back: it is its own inverse
                    self._turn(view, site, hadamard(turned))

    def _turn(self, view: "BlockView", site: Site, R: Tensor) -> None:
        before = self._error(view, site)
        view.folder.turn(site, R)
        after = self._error(view, site)
        view.folder.turn(site, R.T)
        if self.always or after < before:
            view.turn(site, R, "rotate", error_before=before, error=after)

    def _error(self, view: "BlockView", site: Site) -> float:
        """Of the block's output, with both weights and what is between them rounded to nearest."""
        assert isinstance(site.maker, Rows)
        weights, inputs = simulated(view, site)
        if (made := site.maker.weight) in view.grids:
            weights[made] = on_grid(view.weight(made), None, view.grids[made], view.scale_dtype)
        return view.error(site, weights, inputs)


def hadamard(n: int) -> Tensor:
    """Sylvester's matrix over √n: symmetric and orthogonal.  n a power of two -> float32 [n, n]"""
    return orthogonal(n).float()

"""Rotation of values, the part of QuaRot (Ashkboos et al., 2024; arXiv:2404.00456) that fits into one block.

Attention mixes tokens, not channels.  So within a head the value projection may be followed by any orthogonal R, and
the output projection preceded by its inverse:

    A (X Wᵥᵀ Rᵀ) (W_o Rᵀ)ᵀ = A X Wᵥᵀ W_oᵀ,   R = Hadamard / √n

With R the Hadamard matrix every new channel is a mean of all old ones with signs: what stands out in one of them is
spread over the head, in the weights as in what the output projection reads.  Both are fused into the weights, and cost
nothing when the model runs.

Spreading is no gain where the large channel is a row of Wᵥ with a scale of its own: then it spoils the others.  So the
output of the block, rounded with and without, decides.

What rotates the stream between the blocks reaches over the whole model, from the embeddings to the head, and is not
done here: a step sees one block, and what the block reads and writes must stay what its neighbours know.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..model.sites import Rows, Site
from ._scaling import on_grid, simulated

if TYPE_CHECKING:
    from ..compress.view import BlockView


class Method(BaseModel):
    """Options of the rotation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "block"
    needs_hessian: ClassVar[bool] = True

    always: bool = Field(False, description="turn every block, not only those whose rounded output comes closer")
    size: int = Field(
        256, ge=2, le=4096, description="channels turned together at most; a head is the most there can be"
    )

    def __call__(self, view: "BlockView") -> None:
        """Turn the values of a block, in place: runs as long as stay exact, which is within a head."""
        for site in view.sites:
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
            view.turn(site, R, "rotation", error_before=before, error=after)

    def _error(self, view: "BlockView", site: Site) -> float:
        """Of the block's output, with both weights and what is between them rounded to nearest."""
        assert isinstance(site.maker, Rows)
        weights, inputs = simulated(view, site)
        if (made := site.maker.weight) in view.grids:
            weights[made] = on_grid(view.weight(made), None, view.grids[made], view.scale_dtype)
        return view.error(site, weights, inputs)


def hadamard(n: int) -> Tensor:
    """Sylvester's matrix over √n: symmetric and orthogonal.  n a power of two -> float32 [n, n]"""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / n**0.5

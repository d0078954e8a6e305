"""What SmoothQuant and AWQ share: which groups of layers are rescaled, and what rounding does to their weights."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.sites import Rows, Site
from ..tensors.grid import Grid

if TYPE_CHECKING:
    from ..compress.view import BlockView

WORTH = 0.95  # dividing an input when the model runs costs time: the error must fall below this share of what it was


def rescalable(view: "BlockView", inner: bool, explicit: bool) -> list[Site]:
    """The sites that factors can be given to, in the order of the block.

    inner: also those between the layers of the block.  explicit: also those that nothing in the block can be folded
    into, if the layers there read what the block or a norm gives them.  A site has factors of that kind only once.
    """
    chosen = []
    for site in view.sites:
        divides = explicit and view.free and site.outer and not any(m in view.done.scales for m in site.members)
        if (site.maker is not None and (inner or site.outer)) or (site.maker is None and divides):
            chosen.append(site)
        elif site.maker is None and site.outer:
            for weight in site.members:
                if weight in view.grids:
                    view.note(
                        weight,
                        "input not rescaled: nothing before it takes factors, only the native format can divide it",
                    )
    return chosen


def tied(site: Site, s: Tensor) -> Tensor:
    """The factors that this site can have: channels that one row makes share theirs."""
    return site.maker.tie(s.cpu()).to(s.device) if isinstance(site.maker, Rows) else s


def on_grid(W: Tensor, s: Tensor | None, grid: Grid, scale_dtype: torch.dtype) -> Tensor:
    """What becomes of W [out, in] on the grid, rounded to nearest after its columns were multiplied by s."""
    scaled = (W if s is None else W * s).cpu()
    scale, zero = grid.fit(scaled, dtype=scale_dtype)
    rounded = grid.decode(grid.encode(scaled, scale, zero), scale, zero).to(W.device)
    return rounded if s is None else rounded / s


def simulated(view: "BlockView", site: Site) -> tuple[dict[Any, Tensor], dict[Any, Any]]:
    """Weights and inputs of a site as they run, rounded to nearest."""
    targets = [weight for weight in site.members if weight in view.grids]
    weights = {w: on_grid(view.weight(w), None, view.grids[w], view.scale_dtype) for w in targets}
    return weights, view.rounded(site)


def lost(view: "BlockView", site: Site, x: Tensor, s: Tensor | None) -> float:
    """What rounding with these factors loses of what the members put out for x [tokens, in].

    The root of the mean of ‖ŷ_t − y_t‖² / ‖y_t‖² over tokens and members: a token counts as much as another, however
    large it is.
    """
    read, losses = view.rounded(site, x, s), []
    for weight in site.members:
        if weight in view.grids:
            W = view.weight(weight)
            y = x @ W.T
            rounded = (read[weight](x) if weight in read else x) @ on_grid(W, s, view.grids[weight], view.scale_dtype).T
            losses.append((rounded - y).square().sum(1) / y.square().sum(1).clamp(min=1e-30))
    return float(torch.stack(losses).mean()) ** 0.5

"""Exact rewrites of a block: the input x of some layers becomes x / s, their columns W · s.

Who makes x is found by looking at one run, not in a table of architectures:

* a norm, if x is the very tensor that it put out: its weight and bias are divided, with or without the offset of
  those that compute (1 + weight);
* an earlier layer, if x changes as its rows do: v before o (attention mixes tokens, not channels), up before down in
  a gated MLP, fc1 before fc2 where the activation between is positively homogeneous.

Nothing of this is taken for granted.  Every rewrite is tried with factors between 1/4 and 4, and counts only if the
layers concerned then read x / s while all others, and the block's output, stay as they were.  So a second reader of
x (the residual of a model with norms behind its layers, a router) shows up whatever it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Weight, weights
from .changes import Change, Scaling, Turning
from .sites import TOLERANCE, Norm, Rows, Site, matching_rows, measured_offset, parameters
from .trace import Trace, apart, norms, trace

CANDIDATES = 8  # earlier layers that are tried as makers of an input, the latest first

Run = Callable[[], tuple[Any, list[Tensor]]]


class Folder:
    """Finds the sites of a block and rescales them, in place.  The block computes in float32.

    run: one batch through the block, always the same.  stored: the type in which parameters that are not quantized
    are written, so that the factors can be such that nothing is lost there.
    """

    def __init__(self, block: nn.Module, run: Run, stored: torch.dtype) -> None:
        self.block, self.run, self.stored = block, run, stored
        self.matrices = {w.module: w for w in weights(block) if w.kind != "experts"}
        self.routed = any(w.kind == "experts" for w in weights(block))
        self.changed: set[str] = set()
        self.before = trace(block, run)

    def sites(self) -> Iterator[Site]:
        """Every group of layers with a common input, in the order in which the block reaches them."""
        groups: dict[int, list[Weight]] = {}
        for name in self.before.order:
            if name in self.matrices and name not in self.before.repeated:
                groups.setdefault(self.before.address[name], []).append(self.matrices[name])
        for address, members in groups.items():
            maker = self.before.made.get(address)
            is_norm = maker in norms(self.block)
            site = Site(tuple(members), None, is_norm or address in self.before.given)
            yield self._proven(site, maker if is_norm else None)

    def _proven(self, site: Site, norm: str | None) -> Site:
        for maker in self._makers(site, norm):
            candidate = replace(site, maker=maker)
            s = _trial(self._width(site))
            trial = Scaling(candidate, maker.tie(s) if isinstance(maker, Rows) else s)
            undo = self._apply(trial)
            after = trace(self.block, self.run)
            undo()
            if self._same(after, trial):
                return candidate
        return site

    def _makers(self, site: Site, norm: str | None) -> Iterator[Norm | Rows]:
        if norm is not None:
            offset = measured_offset(self.block.get_submodule(norm), self._width(site))
            if offset is not None:
                yield Norm(norm, offset)
        if site.outer:
            return
        at = self.before.order.index(site.name)
        earlier = [self.matrices[n] for n in self.before.order[:at][::-1] if n in self.matrices][:CANDIDATES]
        for weight in earlier:
            if weight.module not in self.before.repeated:
                yield from (Rows(weight, rows) for rows in self._row_maps(site, weight))

    def _row_maps(self, site: Site, weight: Weight) -> Iterator[Tensor]:
        """Which rows may make which channels: as the first token shows, else one run of them."""
        width, out = self._width(site), weight.shape(self.block)[0]
        seen = matching_rows(self.before.first_in.get(site.name), self.before.first_out.get(weight.module))
        if seen is not None:
            yield seen
        if out % width == 0:
            yield from (torch.arange(width) + at for at in range(out - width, -1, -width))

    def _width(self, site: Site) -> int:
        return site.members[0].shape(self.block)[1]

    def scale(self, site: Site, s: Tensor) -> Tensor | None:
        """Divide the input of a site by s > 0 [in], and multiply its columns.

        Returns the factors as they came out: equal where channels have one source, and such that a norm's weight is
        exact in the type it is stored in.  None, and nothing is changed, if the block then computes something else.
        """
        if site.maker is None:
            return None
        s = self._storable(site.maker, s.float())
        return s if self._change(Scaling(site, s)) else None

    def turn(self, site: Site, R: Tensor) -> bool:
        """Multiply each run of b channels of what a site reads by R, orthogonal [b, b].

        False, and nothing is changed, if the block then computes something else: a run must not leave a head.
        """
        if not isinstance(site.maker, Rows) or self._width(site) % len(R):
            return False
        return self._change(Turning(site, R))

    def _change(self, change: Scaling | Turning) -> bool:
        undo = self._apply(change)
        after = trace(self.block, self.run)
        if not self._same(after, change):
            undo()
            return False
        self.before = after
        made = change.site.maker
        maker = made.module if isinstance(made, Norm) else made.weight.module if made else ""
        self.changed |= {f"{maker}.{name}" for name, _ in parameters(self.block.get_submodule(maker))}
        self.changed |= {member.name for member in change.site.members}
        return True

    def _storable(self, maker: Norm | Rows, s: Tensor) -> Tensor:
        if isinstance(maker, Rows):
            return maker.tie(s)
        module = self.block.get_submodule(maker.module)
        gain = module.get_parameter("weight").detach().float().cpu() + maker.offset
        rounded = (gain / s - maker.offset).to(self.stored).float() + maker.offset
        exact = gain / rounded
        sound = torch.isfinite(exact) & torch.isfinite(rounded) & (exact > 0)
        return torch.where(gain == 0, s, torch.where(sound, exact, torch.ones_like(s)))

    def _apply(self, change: Change) -> Callable[[], None]:
        """Change without asking; returns what takes it back."""
        edits = [(view, view.clone(), new) for view, new in change.edits(self.block)]
        for view, _, new in edits:
            view.copy_(new)

        def undo() -> None:
            for view, old, _ in edits:
                view.copy_(old)

        return undo

    def _same(self, after: Trace, change: Scaling | Turning) -> bool:
        """Whether the members read what they should, and all else is as it was."""
        members = {m.module for m in change.site.members}
        if after.order != self.before.order or len(after.outputs) != len(self.before.outputs):
            return False
        pairs = list(zip(after.outputs, self.before.outputs, strict=True))
        for name, x in after.inputs.items():
            pairs.append((change.back(x) if name in members else x, self.before.inputs[name]))
        return all(apart(a, b, routed=self.routed) < TOLERANCE for a, b in pairs)


def _trial(width: int) -> Tensor:
    """Factors between 1/4 and 4, all different: what is only nearly exact cannot hide."""
    return torch.exp2(torch.linspace(-2, 2, width))[torch.randperm(width, generator=torch.Generator().manual_seed(0))]

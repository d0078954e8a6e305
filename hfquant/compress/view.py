"""What a step that works on a whole block is given: its groups of layers, what they read, and how to rescale them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import Weight, hidden
from ..model.fold import Folder
from ..model.sites import Norm, Rows, Site
from ..model.trace import apart, tensors
from ..runtime.gram import add_gram
from ..tensors.grid import Grid
from .rounding import Ranges, Reading, Rounded, measured
from .streaming import Passage

SEARCHED = 4096  # tokens that a search looks at
SAMPLE = 512  # of their inputs at a site that are kept


@dataclass
class Seen:
    """What calibration tokens bring to one site.

    low, high [in]: the extremes; absmax, mean [in]: of |x|; H [in, in] = Σ x xᵀ if asked for; sample [some, in].
    """

    low: Tensor
    high: Tensor
    total: Tensor
    tokens: int = 0
    H: Tensor | None = None
    some: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, keep: int) -> None:
        """x [tokens, in], about so many of which are kept."""
        torch.minimum(self.low, x.amin(0), out=self.low)
        torch.maximum(self.high, x.amax(0), out=self.high)
        self.total += x.abs().sum(0)
        self.tokens += x.shape[0]
        # an odd step, so that it does not meet the same places in all sequences
        self.some.append(x[:: max(1, x.shape[0] // max(1, keep)) | 1].clone())
        if self.H is not None:
            add_gram(self.H, x)

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(-self.low, self.high)

    @property
    def sample(self) -> Tensor:
        return torch.cat(self.some)

    @property
    def mean(self) -> Tensor:
        return self.total / max(1, self.tokens)


@dataclass
class Prepared:
    """What the steps changed in a block beside the weights that go on to be compressed.

    scales: the factors that layers divide their input by when they run.  changed: parameters, by their name in the
    block.  rows: what was done at which site, for the report.  notes: for the weights' own.
    """

    scales: dict[Weight, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[Weight, tuple[str, ...]] = field(default_factory=dict)


class BlockView:
    """A block in float32, for steps of scope "block".

    grids: of the weights that will be compressed.  readings: how their inputs will be rounded.  stored: the type that
    all else is written in.  free: whether the checkpoint's format can say that a layer divides its input.
    """

    def __init__(
        self,
        block: nn.Module,
        passage: Passage,
        index: int,
        grids: Mapping[Weight, Grid],
        readings: Mapping[Weight, Reading],
        scale_dtype: torch.dtype,
        stored: torch.dtype,
        free: bool,
    ) -> None:
        self.block, self.passage, self.index = block, passage, index
        self.grids, self.readings, self.scale_dtype, self.stored, self.free = grids, readings, scale_dtype, stored, free
        self.folder = Folder(block, lambda: self._run(0), stored)
        self.sites = [s for s in self.folder.sites() if any(m in grids for m in s.members)]
        self.done = Prepared()
        self._reference: list[Tensor] = []

    def _run(self, batch: int) -> tuple[Any, list[Tensor]]:
        device = next(self.block.parameters()).device
        call = float32_call(self.passage.arguments(self.index, batch), device)
        return self.block(*call[0], **call[1]), list(tensors(call))

    def weight(self, weight: Weight) -> Tensor:
        """float32 [out, in], as rewritten so far"""
        return weight.get(self.block)

    def seen(self, sites: Sequence[Site], *, hessian: bool = False, whole: bool = True) -> dict[Site, Seen]:
        """Run the batches, all or those that a search looks at, and sum what the sites read."""
        found: dict[Site, Seen] = {}
        batches = range(len(self.passage.batches)) if whole else self.searched
        keep = -(-SAMPLE // len(batches))

        def add(site: Site, x: Tensor) -> None:
            x = x.reshape(-1, x.shape[-1])
            if site not in found:
                zero = torch.zeros_like(x[0])
                found[site] = Seen(zero, zero.clone(), zero.clone())
                if hessian:
                    found[site].H = x.new_zeros(x.shape[1], x.shape[1])
            found[site].add(x, keep)

        with self._watching(sites, add):
            for batch in batches:
                self._run(batch)
        for seen in found.values():
            if seen.H is not None:
                lower = seen.H.tril()
                seen.H = lower + lower.tril(-1).T
        return found

    @contextmanager
    def _watching(self, sites: Sequence[Site], see: Any) -> Iterator[None]:
        with ExitStack() as hooks:
            for site in sites:

                def read(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                    see(site, args[0] if args else next(iter(kwargs.values())))

                module = self.block.get_submodule(site.name)
                hooks.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
            yield

    @property
    def searched(self) -> list[int]:
        """The batches that a search looks at, from all over the text."""
        batches, long = self.passage.batches, self.passage.stream.shape[0]
        many = min(len(batches), max(1, SEARCHED // (max(n for _, n in batches) * long)))
        return [i * len(batches) // many for i in range(many)]

    def rounded(self, site: Site, x: Tensor | None = None, s: Tensor | None = None) -> dict[Weight, Rounded]:
        """How the members' inputs will be rounded if they are x, by default the batch at hand, divided by s first.

        A static scale is then one for all of x.
        """
        ranges = Ranges()
        if x is None:
            with self._watching([site], lambda site, x: ranges.add(x)):
                self._run(0)
        else:
            ranges.add(x if s is None else x / s)
        read = {w: measured(self.readings[w], None, ranges, self.free)[0] for w in site.members if w in self.readings}
        return read if s is None else {w: how.divided(s) for w, how in read.items()}

    def error(self, site: Site, weights: Mapping[Weight, Tensor], inputs: Mapping[Weight, Rounded]) -> float:
        """‖y − ŷ‖ / ‖y‖ of the block's output with these weights at a site, and these inputs, in place of its own."""
        if not self._reference:
            self._reference = [hidden(self._run(batch)[0]) for batch in self.searched]
        kept = {weight: self.weight(weight).clone() for weight in weights}
        with ExitStack() as undo:
            for weight, W in weights.items():
                undo.callback(weight.put, self.block, kept[weight])
                weight.put(self.block, W)
            for weight, how in inputs.items():
                undo.callback(how.hook(self.block.get_submodule(weight.module)).remove)
            outputs = [hidden(self._run(batch)[0]) for batch in self.searched]
        pairs = zip(outputs, self._reference, strict=True)
        errors = [apart(a.float(), b.float()) for a, b in pairs]
        return float(sum(e * e for e in errors) / len(errors)) ** 0.5

    def rescale(self, site: Site, s: Tensor, step: str, **found: Any) -> bool:
        """Divide what a site reads by s [in], all > 0: exactly, in what makes it, or else at run time.

        Returns whether either was possible.  found: for the report.
        """
        where = "input"
        exact = self.folder.scale(site, s.cpu())
        if exact is not None:
            assert site.maker is not None
            where = site.maker.module if isinstance(site.maker, Norm) else site.maker.weight.module
        elif self.free:
            why = (
                "nothing before it could take that"
                if site.maker is None
                else "a rewrite of what makes it was not exact"
            )
            for weight in site.members:
                if weight in self.grids:
                    before = self.done.scales.get(weight)
                    self.done.scales[weight] = s.float().cpu() * (1 if before is None else before)
                    self.note(weight, f"{step}: its input is divided when it runs: {why}")
        else:  # found when the factors were chosen: what can be known beforehand is said there (`rescalable`)
            for weight in site.members:
                if weight in self.grids:
                    self.note(
                        weight,
                        f"{step}: input not rescaled: with its factors the block computed something else, "
                        "and only the native format can divide it when it runs",
                    )
        names = [weight.module for weight in site.members]
        done = exact is not None or self.free
        self.done.rows.append({"step": step, "layers": names, "into": where if done else None, **found})
        return done

    def turn(self, site: Site, R: Tensor, step: str, **found: Any) -> bool:
        """Multiply each run of channels that a site reads by R, orthogonal [b, b], if that is exact."""
        if not self.folder.turn(site, R):
            return False
        assert isinstance(site.maker, Rows)
        names, into = [weight.module for weight in site.members], site.maker.weight.module
        self.done.rows.append({"step": step, "layers": names, "into": into, "size": len(R), **found})
        return True

    def note(self, weight: Weight, text: str) -> None:
        self.done.notes[weight] = (*self.done.notes.get(weight, ()), text)

    def finish(self) -> Prepared:
        """What is to be kept of it all, and put where the block's own weights go."""
        targets = {weight.name for weight in self.grids}
        for name in sorted(self.folder.changed - targets):
            self.done.changed[name] = self.block.get_parameter(name).detach().to("cpu", self.stored, copy=True)
        return self.done


def float32_call(tree: Any, device: torch.device) -> Any:
    """The arguments of a block, for one whose parameters are float32."""
    if isinstance(tree, Tensor):
        return tree.to(device, torch.float32) if tree.is_floating_point() else tree.to(device)
    if isinstance(tree, tuple | list):
        return type(tree)(float32_call(item, device) for item in tree)
    if isinstance(tree, dict):
        return {name: float32_call(item, device) for name, item in tree.items()}
    return tree

"""Every weight of a model against every grid: the table that a choice is made from."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compress.estimate import hidden_size
from ..compress.layout import Layout
from ..compress.selection import Target
from ..memory import settled
from ..model.blocks import Weight
from ..model.inputs import positions
from ..recipe import Recipe
from ..recipe_budget import Budget
from .ahead import Ahead, portions, targets_of
from .candidates import ENDS, Bytes, Candidate, candidates
from .ends import Tables
from .moments import Gradients, Inputs, Sums
from .passes import Backward, backward
from .scores import Spread, losses, rounding, spread, whole
from .table import Row, Table
from .trials import Trials
from .walk import Walk, forward

SEQUENCES = 16  # that gradients are taken on
SCRATCH = "hfquant-"  # what the folder of hidden states begins with
LEARNED = 24  # others that layers learn H from, at least
COLUMN = 4  # tokens to learn from for every column of the widest layer, at least: with fewer H⁻¹ is noise
SEARCH = 40  # ranges that embeddings and head are fitted with

Told = Callable[[int, int], None]  # blocks done, blocks in all


def analyse(
    laid: Layout, recipe: Recipe, tokens: Tensor, folder: Path | None = None, device: str = "cpu",
    told: Told | None = None,
) -> Table:  # fmt: skip
    """The table of a model that is laid out with a recipe that has a budget.

    tokens int64 [samples, seq], of which a few sequences are used.  folder: for hidden states.  told: called after
    every block.
    """
    assert recipe.budget is not None
    began, worked = time.perf_counter(), time.process_time()
    needed = room(laid, recipe, *tokens.shape)
    tokens, judged = _divided(tokens, learning(laid, recipe, tokens.shape[1]))
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as work, settled():
        # without a folder of the user's own, what is temporary may be memory
        ahead = Ahead(laid, None) if folder is None else Ahead.of(laid, Path(work), needed)
        walk = forward(laid.skeleton, tokens, Path(work), device, judged, ahead.watching)
        scoring = _Scoring(laid, recipe, recipe.budget, walk, ahead, told)
        backward(walk, recipe.calibration.seed, scoring.block, scoring.ends)
    scoring.tables()
    scoring.unseen()
    sizes = scoring.bytes
    spent = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked}
    about = {"sequences": len(tokens), "judged": walk.judged, "tokens": walk.judged * tokens.shape[1], **spent}
    return Table(tuple(scoring.rows[name] for name in laid.targets), sizes.rest(), sizes.original(), about)


def room(laid: Layout, recipe: Recipe, samples: int, seq: int) -> int:
    """Bytes of disk for the hidden states before every block, and the gradients before and after one, if there is
    calibration text [samples, seq].  Of an encoder its outputs a second time, as decoders read them, with gradients."""
    used, encoders = sum(_counts(samples, learning(laid, recipe, seq))), len(laid.stacks) - 1
    places = sum(len(stack.blocks) + 1 for stack in laid.stacks) + encoders
    each = max(positions(laid.skeleton.source.config, seq).values()) * hidden_size(laid.skeleton)
    return each * used * (places * laid.skeleton.dtype.itemsize + (2 + encoders) * torch.float32.itemsize)


def learning(laid: Layout, recipe: Recipe, seq: int) -> int:
    """How many sequences of that length layers are to learn from: 0 where nothing chosen from is fitted to text."""
    assert recipe.budget is not None
    if not (rounding(recipe).needs_hessian or recipe.budget.sparsity or recipe.budget.ranks):
        return 0
    widest = max((target.shape[1] for target in laid.targets.values() if target.kind not in ENDS), default=0)
    return max(LEARNED, -(-COLUMN * widest // seq))


def _counts(samples: int, wanted: int) -> tuple[int, int]:
    """How many sequences are judged by, and how many others are learned from."""
    judged = min(SEQUENCES, max(1, samples // 3) if wanted else samples)
    return judged, min(wanted, samples - judged)


def _divided(tokens: Tensor, wanted: int) -> tuple[Tensor, int]:
    """The sequences that are used, those to judge by first, and how many these are.

    Where layers learn from text, they are judged by other text: on what GPTQ has seen, its errors are smaller than
    elsewhere, in some layers by a quarter, in others to a seventh (docs/budget.md).
    """
    count = len(tokens)
    judged, learned = _counts(count, wanted)
    order = torch.arange(count)
    first = order[:: max(1, count // judged)][:judged]
    others = order[~torch.isin(order, first)]
    others = others[:: max(1, len(others) // max(1, learned))][:learned]
    return tokens[torch.cat([first, others])], judged


class _Scoring:
    """rows: by parameter.  places: how many tokens are drawn."""

    def __init__(
        self, laid: Layout, recipe: Recipe, budget: Budget, walk: Walk, ahead: Ahead, told: Told | None
    ) -> None:
        self.laid, self.recipe, self.budget, self.ahead, self.told = laid, recipe, budget, ahead, told
        self.places = places = walk.judged * walk.streamer.tokens.shape[1]
        self.bytes = Bytes(laid, recipe)
        self.step = rounding(recipe)
        self.rows: dict[str, Row] = {}
        self.ends = Tables(places)
        self.tied = set(getattr(laid.skeleton.model, "all_tied_weights_keys", {}).values())
        self.blocks, self.done = sum(len(passage.stack.blocks) for passage in walk.passages), 0

    def block(self, name: str, block: nn.Module, back: Backward) -> None:
        """One block on the way back."""
        found = targets_of(self.laid, name, block)
        parts = portions(block, list(found))
        for i, portion in enumerate(parts):
            inputs = _inputs(block, portion, back, self.ahead.take(name, block, portion))
            H = {leader: whole(S) for leader, S in inputs.H.items()}
            on = {leader: spread(one, self.step) for leader, one in H.items()}
            M = {w: None if (one := on[leader]) is None else one.M for w, leader in inputs.leaders.items()}
            gradients = Gradients(block, portion, M, self.places)
            with gradients.watching():
                back.run(gradients.begin, last=i == len(parts) - 1)
            for weight, sums in gradients.sums.items():
                leader = inputs.leaders[weight]
                W = weight.get(block).flatten(0, -2)
                self._score(found[weight], W, sums, H[leader], on[leader], f"{name}.{leader}")
            del gradients, inputs, M, H, on
        self.done += 1
        if self.told is not None:
            self.told(self.done, self.blocks)

    def _score(self, target: Target, W: Tensor, sums: Sums, H: Tensor, on: Spread | None, inputs: str) -> None:
        """W: all rows."""
        options = candidates(target, self.recipe, self.budget)
        most = max(option.rank for option in options)
        seen = (W if most else W[sums.rows]).float().cpu()
        tried = Trials(seen, sums, H, on, self.step, self.bytes.scale_dtype, most > 0, most)
        self._row(target, inputs, options, [0.0 if option.grid is None else tried.loss(option) for option in options])

    def _row(self, target: Target, inputs: str, options: Sequence[Candidate], found: Sequence[float]) -> None:
        count = self.laid.skeleton.model.get_parameter(target.parameter).numel()
        made = [self.bytes.option(target, o, loss) for o, loss in zip(options, found, strict=True)]
        tied = target.parameter in self.tied
        self.rows[target.parameter] = Row(target.layer, target.kind, count, inputs, tuple(made), target.shape, tied)

    def tables(self) -> None:
        """Embeddings and head."""
        for name, target in self.laid.targets.items():
            if target.kind in ENDS:
                parts = [self.ends.of_embeddings(target.shape[0])] if target.kind == "embedding" else []
                if target.kind == "head" or name in self.tied:
                    parts.append(self.ends.of_head())
                if any(part is not None for part in parts):
                    self._table(target, [part for part in parts if part is not None])

    def _table(self, target: Target, parts: Sequence[Sums]) -> None:
        options = candidates(target, self.recipe, self.budget)
        total = [0.0] * len(options)
        skeleton, width = self.laid.skeleton, target.shape[1]
        info = skeleton.source.tensors[skeleton.stored[target.parameter][0]]
        for sums in parts:
            W = torch.stack([info.read(int(row) * width, width).float() for row in sums.rows])
            each = losses(W, sums, options, SEARCH, self.bytes.scale_dtype)
            total = [a + b for a, b in zip(total, each, strict=True)]
        self._row(target, target.layer, options, total)

    def unseen(self) -> None:
        """Weights that no text reaches stay on the recipe's grid: nothing is known of them."""
        for name, target in self.laid.targets.items():
            if name not in self.rows:
                self._row(target, target.layer, [Candidate.of(target.grid)], [0.0])


def _inputs(block: nn.Module, portion: Sequence[Weight], back: Backward, known: Inputs | None) -> Inputs:
    """What weights read in the text that they learn from; of experts that only other text reaches, in that.  known: the
    former, if it has been gathered."""
    inputs = known or Inputs(block, portion)
    if known is None:
        with inputs.watching():
            back.look()
    if left := [weight for weight in portion if weight not in inputs.leaders]:
        others = Inputs(block, left)
        with others.watching():
            back.look(judged=True)
        inputs.leaders |= others.leaders
        inputs.H |= others.H
    return inputs

"""Every weight of a model against every grid: the table that a choice is made from."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compress.layout import Layout
from ..compress.portions import ROOM, nbytes
from ..compress.selection import Target
from ..memory import give_back, settled
from ..model.blocks import Weight, weights
from ..recipe import Recipe
from ..recipe_budget import Budget
from ..tensors.grid import Grid
from .candidates import Bytes, Candidate, candidates
from .ends import Table as EndsTable
from .moments import Gradients, Inputs, Sums
from .passes import Backward, Walk, backward, forward
from .scores import losses, rounding, spread, whole
from .table import Option, Row, Table

SEQUENCES = 16  # that gradients are taken on
ENDS = ("embedding", "head")

Told = Callable[[int, int], None]  # blocks done, blocks in all


def analyse(
    laid: Layout, recipe: Recipe, tokens: Tensor, folder: Path | None = None, device: str = "cpu",
    told: Told | None = None,
) -> Table:  # fmt: skip
    """The table of a model that is laid out with a recipe that has a budget.

    tokens int64 [samples, seq], of which the first few sequences are used.  folder: for hidden states.
    """
    assert recipe.budget is not None
    began = time.perf_counter()
    tokens = tokens[:: max(1, len(tokens) // SEQUENCES)][:SEQUENCES]
    with tempfile.TemporaryDirectory(prefix="hfquant-", dir=folder) as work, settled():
        walk = forward(laid.skeleton, tokens, Path(work), device)
        scoring = _Scoring(laid, recipe, recipe.budget, walk, tokens.numel(), told)
        backward(walk, recipe.calibration.seed, scoring.block, scoring.ends)
        scoring.tables()
    sizes = scoring.bytes
    about = {"sequences": len(tokens), "tokens": tokens.numel(), "seconds": time.perf_counter() - began}
    rows = [scoring.rows[name] for name in laid.targets if name in scoring.rows]
    return Table((*rows, *scoring.unseen()), sizes.rest(), sizes.original(), about)


class _Scoring:
    def __init__(
        self, laid: Layout, recipe: Recipe, budget: Budget, walk: Walk, places: int, told: Told | None
    ) -> None:
        self.laid, self.recipe, self.budget, self.walk, self.places, self.told = laid, recipe, budget, walk, places, told
        self.bytes = Bytes(laid, recipe, budget)
        self.search = int(getattr(rounding(recipe), "search", 0))
        self.rows: dict[str, Row] = {}
        vocabulary = int(laid.skeleton.model.config.get_text_config(decoder=True).vocab_size)
        self.ends = EndsTable(places, vocabulary)
        self.blocks = sum(len(passage.stack.blocks) for passage in walk.passages)
        self.done = 0

    def block(self, name: str, block: nn.Module, back: Backward) -> None:
        """One block on the way back."""
        found = {w: self.laid.targets[f"{name}.{w.name}"] for w in weights(block) if f"{name}.{w.name}" in self.laid.targets}
        portions = list(_portions(block, list(found)))
        for i, portion in enumerate(portions or [[]]):
            inputs = Inputs(block, portion)
            if portion:
                with inputs.watching():
                    back.look()
            H = {leader: whole(S) for leader, S in inputs.H.items()}
            M = {leader: spread(one, self.recipe) for leader, one in H.items()}
            gradients = Gradients(
                block, portion, {w: M[leader] for w, leader in inputs.leaders.items()}, self.places
            )
            with gradients.watching():
                back.run(lambda n, gradients=gradients: setattr(gradients, "samples", n), last=i == len(portions or [[]]) - 1)
            for weight, sums in gradients.sums.items():
                leader = inputs.leaders[weight]
                W = weight.get(block).flatten(0, -2)
                self._score(found[weight], W[sums.rows.to(W.device)].float().cpu(), sums, _importance(H[leader]), f"{name}.{leader}")
            del gradients, inputs, M, H
        self.done += 1
        if self.told is not None:
            self.told(self.done, self.blocks)

    def _score(
        self, target: Target, W: Tensor, sums: Sums, importance: Tensor | None, inputs: str, search: int | None = None
    ) -> None:
        options = candidates(target, self.recipe, self.budget)
        grids = {i: option.grid.grid() for i, option in enumerate(options) if option.grid is not None}
        search = self.search if search is None else search
        if target.kind not in ENDS and not getattr(rounding(self.recipe), "needs_hessian", False):
            importance = None
        found = dict(zip(grids, losses(W, sums, importance, list(grids.values()), search, self.bytes.scale_dtype), strict=True))
        self._row(target, inputs, options, [found.get(i, 0.0) for i in range(len(options))])

    def _row(self, target: Target, inputs: str, options: Sequence[Candidate], found: Sequence[float]) -> None:
        count = self.laid.skeleton.model.get_parameter(target.parameter).numel()
        made = [Option(o.grid, self.bytes.of(target, o), loss) for o, loss in zip(options, found, strict=True)]
        self.rows[target.parameter] = Row(target.layer, target.kind, count, inputs, tuple(made))

    def tables(self) -> None:
        """Embeddings and head, at last."""
        tied = set(getattr(self.laid.skeleton.model, "all_tied_weights_keys", {}).values())
        for name, target in self.laid.targets.items():
            if target.kind not in ENDS:
                continue
            parts = [self.ends.of_embeddings()] if target.kind == "embedding" else []
            if target.kind == "head" or name in tied:
                parts.append(self.ends.of_head())
            self._table(target, [part for part in parts if part is not None])

    def _table(self, target: Target, parts: Sequence[Sums]) -> None:
        options = candidates(target, self.recipe, self.budget)
        total = [0.0] * len(options)
        info = self.laid.skeleton.source.tensors[self.laid.skeleton.stored[target.parameter][0]]
        for sums in parts:
            width = target.shape[1]
            W = torch.stack([info.read(int(row) * width, width).float() for row in sums.rows])
            for i, option in enumerate(options):
                if option.grid is not None:
                    total[i] += losses(W, sums, None, [option.grid.grid()], 40, self.bytes.scale_dtype)[0]
        self._row(target, target.layer, options, total)

    def unseen(self) -> list[Row]:
        """Weights that no text reaches stay on the recipe's grid: nothing is known of them."""
        found = []
        for name, target in self.laid.targets.items():
            if name not in self.rows:
                own = self.recipe.grid_for(target.layer, target.kind)
                option = Option(own, self.bytes.of(target, Candidate(own)), 0.0)
                count = self.laid.skeleton.model.get_parameter(name).numel()
                found.append(Row(target.layer, target.kind, count, target.layer, (option,)))
        return found


def _importance(H: Tensor) -> Tensor:
    diagonal = H.diagonal()
    return diagonal + 1e-8 * diagonal.mean()


def _portions(block: nn.Module, found: Sequence[Weight]) -> list[list[Weight]]:
    """Weights whose H and M fit into the room for statistics together."""
    parts: list[list[Weight]] = []
    used = 0
    for weight in found:
        each = 3 * nbytes(weight.shape(block)[1])
        if not parts or used + each > ROOM:
            parts.append([])
            used = 0
        parts[-1].append(weight)
        used += each
    return parts

"""The same choice for a model that is in memory already: what `from_pretrained` uses."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..compress.layout import Layout
from ..compress.plan import check_room
from ..compress.resident import Resident
from ..compress.selection import select, wire_for
from ..model.blocks import stacks
from ..model.skeleton import Skeleton
from ..recipe import Recipe
from .analysis import analyse, room
from .decide import Decision, check, decide
from .door import outline, outlined
from .speed import timed


@dataclass(frozen=True)
class _Held:
    """A parameter, asked like a tensor in a file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int, count: int) -> Tensor:
        return self.tensor.detach().reshape(-1)[start : start + count].cpu()


@dataclass(frozen=True)
class _Source:
    config: Any
    tensors: dict[str, _Held]
    dtype: torch.dtype

    @property
    def total_bytes(self) -> int:
        return sum(held.tensor.nbytes for held in self.tensors.values())


class _Loaded(Resident):
    """A skeleton whose parts are all there, and would be stored under their own names."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        held = {name: _Held(p) for name, p in model.named_parameters()}
        self.source: Any = _Source(model.config, held, dtype)
        self.stored = {name: [name] for name in held}
        self.converted: set[str] = set()

    def stored_names(self, parameter: str, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        stem = parameter.removesuffix(".weight")
        yield from ((f"{stem}.{component}", tensor) for component, tensor in parts.items())


def choose_for(model: nn.Module, recipe: Recipe, batches: Sequence[Tensor]) -> Decision:
    """The decision for a dense model in memory, which is left as it is.

    recipe: with a budget.  batches: token ids int64 [n, seq], all of one length.  Raises RecipeError for a budget that
    cannot be met.
    """
    assert recipe.budget is not None
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    all_of_it = outlined(recipe)
    targets = select(model, all_of_it)
    skeleton = cast(Skeleton, _Loaded(model, dtype))
    laid = Layout(
        skeleton=skeleton, stacks=tuple(stacks(model)), targets=targets,
        wire=wire_for(targets, model, all_of_it, dtype), layers={}, dtype=dtype,
    )  # fmt: skip
    check(outline(laid, recipe), recipe.budget)
    tokens = torch.cat(list(batches)).cpu()
    check_room(Path(tempfile.gettempdir()), room(laid, recipe, *tokens.shape))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # only gradients of hidden states are wanted
        p.requires_grad_(False)
    try:
        table = analyse(laid, recipe, tokens)
        return decide(timed(table, model.config, dtype) if recipe.budget.fastest else table, recipe)
    finally:
        for p in trained:
            p.requires_grad_(True)

"""A dense model whose layers compute with compressed weights and rounded inputs while the weights learn."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compress.rounding import Ranges, Reading, Rounded, measured
from ..compress.selection import Target
from ..errors import RecipeError
from ..runtime.swap import tied_modules
from ..tensors.layer import Quantized
from .scaling import Scaling


class Learning(nn.Module):
    """What the layers below share.

    rounded: how the input is rounded.  borrowed: the scaling is another module's, with which this one shares its
    weight; in a tuple, so that it is no submodule twice.
    """

    rounded: Rounded
    borrowed: tuple[Scaling, ...]

    @property
    def own(self) -> Scaling:
        return self.borrowed[0] if self.borrowed else cast(Scaling, self.scaling)

    @property
    def matrix(self) -> Tensor:
        """The weight that learns [out, in]."""
        W = cast(Tensor, self.weight)
        return W.T if isinstance(self, Conv1D) else W

    def on_grid(self) -> Tensor:
        """The weight that runs [out, in], float32."""
        return cast(Tensor, self.own(self.matrix))

    def quantized(self) -> Quantized:
        """What is stored of this layer."""
        return self.rounded.on(self.own.quantized(self.matrix))


class LearningLinear(Learning, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x)
        return linear(x, self.on_grid().to(x.dtype), self.bias)


class LearningConv1D(Learning, Conv1D):  # type: ignore[misc]
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x)
        return linear(x, self.on_grid().to(x.dtype), self.bias)


class LearningEmbedding(Learning, nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        values = embedding(ids, self.on_grid().to(self.weight.dtype), self.padding_idx)
        factor: Any = getattr(self, "scalar_embed_scale", getattr(self, "embed_scale", None))
        if factor is None:
            return values
        # Gemma's factor is rounded to the model's type, and was trained so
        return values * (torch.tensor(factor, dtype=values.dtype) if hasattr(self, "scalar_embed_scale") else factor)


def learning(model: PreTrainedModel, targets: Mapping[str, Target], scalings: Mapping[str, Scaling]) -> list[str]:
    """Have the targets' modules compute on their grids, in place; those tied to them too.  Returns their names.

    scalings: by parameter.  Parameters stay the same objects under the same names.  Raises RecipeError for a layer of
    a kind that cannot be trained.
    """
    found = []
    for parameter, target in targets.items():
        module = model.get_submodule(target.layer)
        own = _adopt(module)
        own.scaling, own.borrowed, own.rounded = scalings[parameter], (), Rounded()
        _put(model, target.layer, module, own)
        found.append(target.layer)
    for name, source in tied_modules(model).items():
        owner, module = model.get_submodule(source), model.get_submodule(name)
        if isinstance(owner, Learning) and not isinstance(module, Learning):
            own = _adopt(module)
            own.borrowed, own.rounded = (owner.own,), Rounded()
            _put(model, name, module, own)
            found.append(name)
    return found


def _put(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Under every name the module has: T5's encoder and decoder hold the same table."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
    for n in names or [name]:
        model.set_submodule(n, new)


def _adopt(module: nn.Module) -> Any:
    """The module as one that learns, with the same parameters and hooks."""
    if isinstance(module, nn.Embedding):
        made: type[nn.Module] = type(f"Learning{type(module).__name__}", (LearningEmbedding, type(module)), {})
    elif isinstance(module, Conv1D):
        made = LearningConv1D
    elif isinstance(module, nn.Linear):
        made = LearningLinear
    else:
        raise RecipeError(
            f"{type(module).__name__} cannot be trained on a grid", "leave it out: `--set keep=[NAME]`, or compress it"
        )
    own = made.__new__(made)
    own.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    return own


@torch.no_grad()
def round_inputs(
    model: nn.Module, targets: Mapping[str, Target], wanted: Reading | None, batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Have the layers round what they read; where ranges must be seen first, they are measured on these batches."""
    if wanted is None:
        return
    names = [target.layer for target in targets.values() if target.activations is not None]
    ranges = {name: Ranges() for name in names if wanted.needs_ranges}
    with ExitStack() as hooks:
        for name, seen in ranges.items():

            def note(module: nn.Module, args: Any, seen: Ranges = seen) -> None:
                seen.add(args[0])

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(note).remove)
        for batch in batches if ranges else ():
            model(**batch)
    for name in names:
        found = ranges.get(name)
        known = found if found is not None and found.low else None
        cast(Any, model.get_submodule(name)).rounded = measured(wanted, None, known, True)[0]


def learners(model: nn.Module) -> Iterator[tuple[str, Learning]]:
    """The layers that learn, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Learning):
            yield name, module

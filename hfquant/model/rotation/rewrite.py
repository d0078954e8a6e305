"""The source of a rotated model."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...tensors.hadamard import rotation
from ..blocks import stacks
from ..rewritten import Rewritten
from ..skeleton import Skeleton
from ..source import Source
from .edits import Edits
from .proof import prove
from .run import run
from .structure import Structure, check_kind, inside, outside, table

if TYPE_CHECKING:
    from ...compress.streaming import Passage


def untied(source: Source) -> Rewritten:
    """The same model whose head has a weight of its own, if it had not: what can be said from headers alone.

    Raises SourceError for a kind of model that cannot be rotated.
    """
    model = Skeleton(source, torch.float32)
    check_kind(model, stacks(model.model))
    head = model.model.get_output_embeddings()
    tensors, changes, config = dict(source.tensors), dict(source.changes), source.config
    shared = isinstance(head, nn.Module) and head.weight is table(model.model).weight
    if shared:
        owner, name = (_parameter(model.model, module) for module in (table(model.model), head))
        tensors[name] = source.tensors[model.stored[owner if owner in model.stored else name][0]]
        config, changes = copy.deepcopy(config), changes | {"tie_word_embeddings": False}
        config.tie_word_embeddings = False
    more = tensors[name].nbytes if shared else 0
    return Rewritten(
        source.id, source.revision, source.path, config, tensors, source.files, source.facts, changes,
        origin=source, about={"untied_bytes": more},
    )  # fmt: skip


def _parameter(model: nn.Module, module: nn.Module) -> str:
    return next(f"{name}.weight" for name, other in model.named_modules() if other is module)


def rotated(source: Source, seed: int) -> Rewritten:
    """The same model with a rotated stream.  Raises SourceError, before anything is written, for one that has to stay.

    Reads all weights twice: once to see what the model computes, once to see that it still does.
    """
    skeleton = Skeleton(source, torch.float32)
    blocks = stacks(skeleton.model)
    check_kind(skeleton, blocks)
    found: list[Structure] = []

    def look(passage: "Passage", i: int, block: nn.Module) -> None:
        if not found:
            found.append(outside(skeleton, passage.stack.blocks, passage.stream.shape[-1]))
        args, kwargs = passage.arguments(i, 0)
        inside(skeleton, passage.stack.blocks[i], block, lambda: block(*args, **kwargs), found[0])

    before = run(skeleton, look)
    structure = found[0]
    Q = rotation(structure.width, seed, keep_mean=any(norm.centers for norm in structure.norms))
    base = untied(source)
    result = Rewritten(**{**vars(base), "tensors": {**base.tensors, **Edits(skeleton, base, structure, Q).tensors()}})
    error = prove(skeleton, before, run(Skeleton(result, torch.float32)), Q, structure)
    result.about.update(width=structure.width, factors=[len(part) for part in Q.parts], error=error)
    return result

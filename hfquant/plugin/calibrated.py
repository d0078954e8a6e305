"""Recipes that look at activations, on a model that is in memory already."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import CalibrationError
from ..recipe import Recipe
from ..runtime.swap import swap
from ..tensors.encoding import Encoding
from ..tensors.formats import Wire, load
from ..tensors.layer import Quantized
from .checkpoint import mark_initialized
from .config import HfQuantConfig
from .onload import frozen, pack


def compress_loaded(model: Any, config: HfQuantConfig, batches: list[Tensor] | None = None) -> Wire:
    """Compress a dense model in place, block after block, and say how it is stored now.

    batches: from `calibration_batches`; None: of text that the model has to write itself.  What a budget leads to
    takes the place of the config's recipe.

    Raises CalibrationError if there is no text to show it, FormatError if a layer does not fit the format.
    """
    from ..compress import compress_model
    from ..compress.selection import select, wire_for

    batches = calibration_batches(model, config) if batches is None else batches
    if config.recipe.budget is not None:
        from ..budget.loaded import choose_for

        config.recipe = choose_for(model, config.recipe, batches).recipe
    targets = select(model, config.recipe, model.dtype)
    wire = wire_for(targets, model, config.recipe, model.dtype)
    found: dict[str, Encoding] = {}
    parts: dict[str, Tensor] = {}
    free = wire.format == "native"
    for parameter, Q in compress_model(model, config.recipe, targets, batches, wire.scale_dtype, free=free):
        dense = model.get_parameter(parameter)
        found[targets[parameter].layer] = Q.encoding
        experts = _split(Q, dense.shape[0]) if targets[parameter].kind == "experts" else [Q]
        packed = pack(load(wire.format), targets[parameter], experts)
        parts |= {name: tensor.to(dense.device) for name, tensor in packed.items()}
    wire = wire.as_written(found)
    swap(model, wire)
    mark_initialized(model)
    for name, tensor in parts.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = frozen(tensor)
    model.tie_weights(recompute_mapping=False)
    return wire


def _split(Q: Quantized, experts: int) -> list[Quantized]:
    """All experts' rows one after the other -> one by one."""
    rows = Q.shape[0] // experts
    return [Q.rows(slice(e * rows, (e + 1) * rows)) for e in range(experts)]


def calibration_batches(model: nn.Module, config: HfQuantConfig) -> list[Tensor]:
    """Token batches [n, seq] int64: the user's, or cut from the user's texts, or from the recipe's source."""
    from ..model.calibration import random_tokens, self_generated, token_batches
    from ..model.inputs import vocabulary

    if config.batches is None:
        asked = config.recipe.calibration
        size = {"samples": asked.samples, "seq_len": asked.seq_len, "seed": asked.seed}
        if asked.source == "self":
            return [self_generated(model, **size)]
        if asked.source == "random":
            return [random_tokens(vocabulary(model.config), **size)]
        return [token_batches(asked.source, _tokenizer(model, config), **size)]
    given: list[Any] = list(config.batches)
    if given and all(isinstance(text, str) for text in given):
        return [_windows(given, _tokenizer(model, config), config.recipe)]
    if not given or not all(isinstance(b, Tensor) and b.ndim == 2 and b.dtype == torch.int64 for b in given):
        raise CalibrationError(
            "calibration must be a list of texts, or of token batches [batch, seq] int64",
            "pass e.g. `calibration=[tokenizer(text, return_tensors='pt').input_ids]`",
        )
    if len({batch.shape[1] for batch in given}) > 1:
        raise CalibrationError(
            "the calibration batches differ in length", "cut them to one length, or pass the texts themselves"
        )
    return given


def _windows(texts: Iterable[str], tokenizer: Any, recipe: Recipe) -> Tensor:
    """The texts one after the other, cut into windows [samples, seq_len]; the seed picks."""
    samples, length = recipe.calibration.samples, recipe.calibration.seq_len
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    if len(ids) < length:
        raise CalibrationError(
            f"the calibration texts have {len(ids)} tokens, less than one sample of {length}",
            "pass more text, or a smaller `seq_len`",
        )
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.calibration.seed))
    return windows[order[:samples]]


def _tokenizer(model: Any, config: HfQuantConfig) -> Any:
    return config.tokenizer or transformers.AutoTokenizer.from_pretrained(model.config.name_or_path)

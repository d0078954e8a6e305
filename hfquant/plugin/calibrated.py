"""Recipes that look at activations, on a model that is already in memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..errors import CalibrationError
from ..recipe import Recipe
from ..tensors.formats import Wire, load
from .config import HfQuantConfig
from .selection import select, wire_for

BATCH = 8  # windows that go through the model together


def compress_loaded(model: nn.Module, config: HfQuantConfig) -> Wire:
    """Compress a dense model in place, layer after layer, and say how it is stored now.

    Raises CalibrationError if there is no text to show it, FormatError if a layer does not fit the format.
    """
    from ..compress import compress_model

    recipe = config.recipe
    targets = select(model, recipe)
    wire = wire_for(targets, model, recipe, next(p.dtype for p in model.parameters() if p.is_floating_point()))
    by_layer = {target.layer: target for target in targets.values()}
    parts: dict[str, Tensor] = {}
    for name, Q in compress_model(model, recipe, calibration_batches(model, config), load(wire.format)):
        pass
    return wire


def calibration_batches(model: nn.Module, config: HfQuantConfig) -> list[Tensor]:
    """Token batches [n, seq] int64: the user's, or cut from the user's texts, or from the recipe's source."""
    if config.batches is None:
        from ..model.calibration import token_batches

        asked = config.recipe.calibration
        tokens = token_batches(
            asked.source, _tokenizer(model, config), samples=asked.samples, seq_len=asked.seq_len, seed=asked.seed
        )
        return list(tokens.split(BATCH))
    given = list(config.batches)
    if given and all(isinstance(text, str) for text in given):
        return list(_windows(given, _tokenizer(model, config), config.recipe).split(BATCH))  # type: ignore[arg-type]
    if not given or not all(isinstance(b, Tensor) and b.ndim == 2 and b.dtype == torch.int64 for b in given):
        raise CalibrationError(
            "calibration must be a list of texts, or of token batches [batch, seq] int64",
            "pass e.g. `calibration=[tokenizer(text, return_tensors='pt').input_ids]`",
        )
    return given  # type: ignore[return-value]


def _windows(texts: Iterable[str], tokenizer: Any, recipe: Recipe) -> Tensor:
    """The texts one after the other, cut into windows [samples, seq_len]."""
    samples, length = recipe.calibration.samples, recipe.calibration.seq_len
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    if len(ids) < length:
        raise CalibrationError(
            f"the calibration texts have {len(ids)} tokens, less than one sample of {length}",
            "pass more text, or a smaller `seq_len`",
        )
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(recipe.calibration.seed))[:samples]]


def _tokenizer(model: Any, config: HfQuantConfig) -> Any:
    return config.tokenizer or AutoTokenizer.from_pretrained(model.config.name_or_path)

"""The model a compressed one was made from: opened, made to speak, its licence read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.hub import terms
from ..model.skeleton import Skeleton
from ..model.source import Source, open_source
from .generate import Sample, sample
from .machine import available_memory


@contextmanager
def opened(model: str | Path | None, revision: str | None = None) -> Iterator[Source | None]:
    """A model folder, Hub id or GGUF file, the last unpacked for as long as the `with` block lasts.

    None for None.  Raises SourceError as `open_source` does.
    """
    if model is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hfquant-") as staging:
        yield open_source(model, revision, Path(staging))


def whole(source: Source, dtype: torch.dtype) -> PreTrainedModel | None:
    """The original in memory; None where it would not fit."""
    free = available_memory()
    if free is not None and source.parameters * dtype.itemsize * 1.5 > free:
        return None
    cls: type[PreTrainedModel] = type(Skeleton(source, dtype).model)
    model: PreTrainedModel = cls.from_pretrained(source.path, dtype=dtype)
    return model.eval()


def speak(
    source: Source, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, dtype: torch.dtype
) -> Sample | None:
    """The original's continuation of a prompt; None where the whole original would not fit into memory."""
    model = whole(source, dtype)
    return None if model is None else sample(model, tokenizer, prompt, new_tokens)


def facts(source: Source) -> dict[str, Any]:
    """What the original's page on the Hub, or the card in its folder, says of its licence and of who may read it.

    Nothing without either; what they say is not to be trusted.
    """
    if source.facts:
        return dict(source.facts)
    card = source.path / "README.md"
    parts = card.read_text("utf-8", errors="replace").split("---\n", 2) if card.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        metadata = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}  # a card that cannot be read names no licence
    return dict(terms(metadata)) if isinstance(metadata, dict) else {}

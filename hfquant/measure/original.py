"""The model a compressed one was made from: opened, loaded, its licence read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from ..machine import available_memory
from ..model.hub import terms
from ..model.skeleton import Skeleton
from ..model.source import Source, open_source


@contextmanager
def opened(model: str | Path | Source | None, revision: str | None = None) -> Iterator[Source | None]:
    """A model folder, Hub id or GGUF file, the last unpacked for as long as the `with` block lasts.

    None for None, and what is open already as it is.  Raises SourceError as `open_source` does.
    """
    if model is None or isinstance(model, Source):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="hfquant-") as staging:
        yield open_source(model, revision, Path(staging))


def loaded(source: Source, dtype: torch.dtype) -> PreTrainedModel | None:
    """The whole original; None where it would not fit into memory."""
    free = available_memory()
    if free is not None and source.parameters * dtype.itemsize * 1.5 > free:
        return None
    cls: type[PreTrainedModel] = type(Skeleton(source, dtype).model)
    model: PreTrainedModel = cls.from_pretrained(source.path, dtype=dtype)
    return model.eval()


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

"""What is read to measure a model: a text with a name and a hash, cut into windows of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError
from ..model.texts import packaged

PACKAGED = "packaged"


@dataclass(frozen=True)
class Text:
    """A text to measure on.  `name` never holds a folder: it ends up on public cards."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes, 64 hex digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(source: str | Path = PACKAGED) -> Text:
    """The packaged text, or a UTF-8 file.  Raises CalibrationError if the file cannot be read as text."""
    if source == PACKAGED:
        return Text("hfquant evaluation", packaged("evaluation"))
    path = Path(source)
    try:
        return Text(path.name, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read the evaluation text {path}: {error}",
            f"give a UTF-8 text file, or `{PACKAGED}` for the text that comes with hfquant",
        ) from error


def cut(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None) -> Tensor:
    """Non-overlapping windows of a text: int64 [count, length].

    The protocol of the GPTQ paper and of those after it: the whole text is tokenized once (so that a window
    has a BOS token only where the text has one), cut into windows, and the remainder dropped.  The first
    `count` windows are taken, as published numbers for part of a text do; all with None, or where there are no
    more.

    Raises CalibrationError if the text is shorter than a window.
    """
    encoded = tokenizer(text.content, verbose=False)["input_ids"]
    ids = torch.tensor(encoded, dtype=torch.int64)
    total = len(ids) // length
    if not total:
        raise CalibrationError(
            f"the text `{text.name}` has {len(ids)} tokens, fewer than one window of {length}",
            "give a longer text or shorter windows",
        )
    return ids[: total * length].view(total, length)[:count]

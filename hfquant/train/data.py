"""Text -> sequences to learn from, each with a number of its own."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import CalibrationError
from ..model.calibration import source_text
from ..model.inputs import longest, vocabulary

IGNORED = -100  # the label of what counts in no loss, as transformers has it


class Sequences(Dataset[dict[str, Any]]):
    """Items: `sequence`, its number; `input_ids`; `labels`, of a model that reads one text and writes another."""

    def __init__(self, items: Sequence[Mapping[str, list[int]]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"sequence": i, **self.items[i]}


def sequences(source: str, tokenizer: Any, *, seq_len: int, pairs: bool) -> Sequences:
    """The text of a file, `default` (the packaged one) or a Hub dataset, in windows of `seq_len` tokens.

    pairs: for a model that reads one text and writes another: lines of a `.jsonl` file with `source` and `target`,
    or of plain text the first half of each window, from which the second is written.
    Raises CalibrationError for a text too short for a single sequence, or lines without these keys.
    """
    if pairs and source.endswith(".jsonl"):
        return Sequences(_pairs(Path(source), tokenizer, seq_len))
    ids: list[int] = tokenizer(source_text(source), verbose=False)["input_ids"]
    windows = [ids[at : at + seq_len] for at in range(0, len(ids) - seq_len + 1, seq_len)]
    if not windows:
        raise CalibrationError(
            f"text `{source}` has {len(ids):,} tokens, less than one sequence of {seq_len}",
            "give a longer text, or a smaller `seq_len`",
        )
    if not pairs:
        return Sequences([{"input_ids": window} for window in windows])
    half = seq_len // 2
    return Sequences([{"input_ids": window[:half], "labels": window[half:]} for window in windows])


def check(items: Sequences, config: PretrainedConfig) -> None:
    """Raises CalibrationError for tokens that the model has not, or sequences that are too long for it."""
    rows = [items.items[i] for i in range(len(items))]
    most = max(len(ids) for row in rows for ids in row.values())
    largest = max(max(ids, default=0) for row in rows for ids in row.values())
    limit = longest(config)
    if limit is not None and most > limit:
        raise CalibrationError(
            f"sequences of {most} tokens are longer than the model's {limit}",
            f"use `--set quantgpt.seq_len={limit}`",
        )
    if largest >= vocabulary(config):
        raise CalibrationError(
            f"the text's tokens reach {largest}, the model's vocabulary ends at {vocabulary(config)}",
            "the tokenizer does not belong to this model",
        )


def digest(items: Sequences) -> str:
    """sha256 of all sequences: what report and resume call the text."""
    return hashlib.sha256(json.dumps(list(items.items)).encode()).hexdigest()


def _pairs(path: Path, tokenizer: Any, seq_len: int) -> list[dict[str, list[int]]]:
    if not path.is_file():
        raise CalibrationError(f"training file `{path}` does not exist")
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            source, target = row["source"], row["target"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"line {number} of `{path}` is no pair: {error}", 'write `{"source": "...", "target": "..."}` lines'
            ) from None
        read = tokenizer(source, text_target=target, truncation=True, max_length=seq_len)
        found.append({"input_ids": read["input_ids"], "labels": read["labels"]})
    if not found:
        raise CalibrationError(f"training file `{path}` is empty")
    return found


def collate(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """One batch, padded at the end: sequence [n]; input_ids, attention_mask [n, seq]; labels, IGNORED where padded."""
    ids = _padded([row["input_ids"] for row in rows], pad)
    mask = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
    labels = _padded([row.get("labels", row["input_ids"]) for row in rows], IGNORED)
    sequence = torch.tensor([row["sequence"] for row in rows])
    return {"sequence": sequence, "input_ids": ids, "attention_mask": mask, "labels": labels}


def arguments(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is called with for such a batch: no labels, its own loss is not needed."""
    given: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        whole: Any = model
        given["decoder_input_ids"] = whole.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return given | {"use_cache": False}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

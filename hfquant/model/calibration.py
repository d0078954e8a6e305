"""Text -> calibration tokens: which sequences is decided by the seed alone."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from .texts import packaged

GENERATED = 16  # sequences that the model writes together


def token_batches(source: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Calibration sequences, int64 [samples, seq_len].

    source: `default` (the packaged text), a text file, a `.npy` file of token ids (for models without a tokenizer;
    `tokenizer` may then be None), or a Hub dataset with a `text` column.  The text is cut into non-overlapping
    windows, of which the seed picks.  Raises CalibrationError if there is too little of it.
    """
    if source.endswith(".npy"):
        ids = _ids_from_file(Path(source))
    else:
        ids = torch.tensor(tokenizer(source_text(source), verbose=False)["input_ids"], dtype=torch.int64)
    windows = len(ids) // seq_len
    if windows < samples:
        raise CalibrationError(
            f"calibration text `{source}` has {len(ids):,} tokens: {windows} sequences of {seq_len}, not {samples}",
            f"give a longer text, or at most `--samples {windows}`" if windows else "give a longer text",
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return ids[: windows * seq_len].view(windows, seq_len)[chosen].clone()


def self_generated(model: Any, *, samples: int, seq_len: int, seed: int, batch: int = GENERATED) -> Tensor:
    """Sequences the model itself samples at temperature 1 from its first token, int64 [samples, seq_len].

    Needs no text at all (LLM-QAT, Liu et al., 2023, section 3.1), but the whole dense model in memory.
    """
    torch.manual_seed(seed)
    start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
    first = torch.full((min(batch, samples), 1), int(start or 0))
    found: list[Tensor] = []
    with torch.inference_mode():
        while sum(map(len, found)) < samples:
            found.append(
                model.generate(
                    first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                    max_new_tokens=seq_len - 1, min_new_tokens=seq_len - 1, pad_token_id=int(start or 0),
                )
            )  # fmt: skip
    return torch.cat(found)[:samples]


def random_tokens(vocabulary: int, *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Sequences of tokens that have nothing to do with each other, all as likely, int64 [samples, seq_len].

    What ZeroQuant's distillation was shown to work on too (Yao et al., 2022, table 7).
    """
    return torch.randint(vocabulary, (samples, seq_len), generator=torch.Generator().manual_seed(seed))


def digest(tokens: Tensor) -> str:
    """sha256 of the sequences: what the report calls the calibration data."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def source_text(source: str) -> str:
    """The text of a file, of a Hub dataset, or the packaged one (`default`).

    Raises CalibrationError if it cannot be read.
    """
    if source == "default":
        return packaged("calibration")
    path = Path(source).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"`{source}` is not UTF-8 text", "give a plain text file") from error
    if path.is_absolute() or source.startswith(".") or path.suffix in (".txt", ".json", ".jsonl"):
        raise CalibrationError(f"calibration file `{source}` does not exist", "leave it out to use the packaged text")
    return _dataset(source)


def _dataset(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"reading the Hub dataset `{name}` needs the `datasets` package",
            "`pip install datasets`, or give a text file",
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        texts = [row["text"] for row, _ in zip(rows, range(2000), strict=False)]
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"dataset `{name}` cannot be read as text: {str(error).splitlines()[0]}",
            "give a dataset with a `text` column",
        ) from error
    return "\n\n".join(texts)


def _ids_from_file(path: Path) -> Tensor:
    if not path.is_file():
        raise CalibrationError(
            f"calibration file `{path}` does not exist", "give a `.npy` file of token ids, or a text file"
        )
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CalibrationError(f"`{path}` is not a `.npy` file of numbers", "write it with `numpy.save`") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"`{path}` holds {ids.dtype}, not token ids", "store them as int64")
    return torch.from_numpy(ids.astype(np.int64)).flatten()

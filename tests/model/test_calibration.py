"""Calibration text from a dataset of the Hub, read row by row."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hfquant import report
from hfquant.compress import compress, plan
from hfquant.errors import CalibrationError
from hfquant.model.calibration import digest, random_tokens, token_batches
from tests.families import byte_tokenizer

NAME = "someone/stories"
SIZE = {"samples": 4, "seq_len": 32}
ROWS = [{"text": f"Once upon a time there were {i} geese. " * 20, "id": i} for i in range(5000)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package `datasets` that knows these rows, and what was asked of it."""
    found = SimpleNamespace(rows=ROWS, asked=[], read=0, error=None)

    def rows() -> Iterator[dict[str, Any]]:
        for row in found.rows:
            found.read += 1
            yield row

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        found.asked.append((args, kwargs))
        if found.error is not None:
            raise found.error
        return rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return found


def test_a_model_is_compressed_with_the_text_of_a_dataset(
    built: Callable[[str], Path], tmp_path: Path, hub: SimpleNamespace
) -> None:
    todo = plan(built("llama"), "gptq-w4g32", tmp_path / "out", calibration=NAME, **SIZE)
    assert hub.asked == [((NAME,), {"split": "train", "streaming": True})]
    assert hub.read <= 2001, "rows of a large dataset are not all fetched"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(row["text"] for row in ROWS[:2000]))
    wanted = token_batches(str(text), byte_tokenizer(), seed=0, **SIZE)
    assert todo.tokens is not None
    assert torch.equal(todo.tokens, wanted)
    list(compress(todo))
    told = report.read(tmp_path / "out")["calibration"]
    assert (told["source"], told["sha256"]) == (NAME, digest(wanted))


@pytest.mark.parametrize(
    ("error", "rows", "match", "hint"),
    [
        (FileNotFoundError("Dataset 'someone/stories' doesn't exist on the Hub"), [], "doesn't exist", "`text` column"),
        (ValueError("Unknown split"), [], "Unknown split", "`text` column"),
        (None, [{"story": "Once"}], "cannot be read as text: 'text'", "`text` column"),
        (None, ROWS[:1], "sequences of 32, not 4,000", "give a longer text"),
    ],
    ids=["unknown", "split", "column", "short"],
)
def test_one_that_cannot_be_used_is_named(
    error: Exception | None,
    rows: list[dict[str, Any]],
    match: str,
    hint: str,
    built: Callable[[str], Path],
    tmp_path: Path,
    hub: SimpleNamespace,
) -> None:
    hub.error, hub.rows = error, rows
    size = SIZE if "sequences" not in match else SIZE | {"samples": 4000}
    with pytest.raises(CalibrationError, match=match.replace(",000", "000")) as caught:
        plan(built("llama"), "gptq-w4g32", tmp_path / "out", calibration=NAME, **size)
    assert NAME in caught.value.message
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_error_says_what_to_install(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="needs the `datasets` package") as caught:
        plan(built("llama"), "gptq-w4g32", tmp_path / "out", calibration=NAME, **SIZE)
    assert "pip install datasets" in str(caught.value.hint)


def test_random_tokens_are_the_seeds_and_the_models(built: Callable[[str], Path], tmp_path: Path) -> None:
    todo = plan(built("llama"), "gptq-w4g32", tmp_path / "out", calibration="random", seed=3, **SIZE)
    vocabulary = todo.source.config.vocab_size
    assert todo.tokens is not None
    assert torch.equal(todo.tokens, random_tokens(vocabulary, seed=3, **SIZE))
    assert not torch.equal(todo.tokens, random_tokens(vocabulary, seed=4, **SIZE))
    many = random_tokens(vocabulary, samples=64, seq_len=64, seed=0)
    assert (int(many.min()), int(many.max())) == (0, vocabulary - 1)

from pathlib import Path

import pytest
import torch

from hfquant.errors import CalibrationError
from hfquant.measure.text import Text, cut, read_text
from tests.families import byte_tokenizer

from .models import WORDS


def test_windows_are_whole_in_order_and_do_not_overlap() -> None:
    tokenizer, text = byte_tokenizer(), Text("fox", WORDS * 3)
    ids = torch.tensor(tokenizer(text.content)["input_ids"])
    windows = cut(text, tokenizer, 10)
    assert windows.shape == (len(ids) // 10, 10)
    assert len(ids) % 10, "the test wants a remainder"
    assert torch.equal(windows.flatten(), ids[: windows.numel()])


def test_fewer_windows_are_the_first() -> None:
    """Published numbers depend on this selection."""
    tokenizer, text = byte_tokenizer(), Text("fox", WORDS * 3)
    every = cut(text, tokenizer, 10)
    assert torch.equal(cut(text, tokenizer, 10, 4), every[:4])
    assert torch.equal(cut(text, tokenizer, 10, 999), every)


def test_the_packaged_text_is_named_and_hashed() -> None:
    text = read_text()
    assert text.name == "hfquant evaluation"
    assert text.sha256.startswith("72980894")


def test_a_file_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    path = tmp_path / "secret" / "held out.txt"
    path.write_text("naïve", "utf-8")
    assert read_text(path) == Text("held out.txt", "naïve")


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no-such"):
        read_text(tmp_path / "no-such.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="hint: give a UTF-8 text file"):
        read_text(tmp_path / "binary")
    with pytest.raises(CalibrationError, match=r"`short` has 5 tokens, fewer than one window of 6"):
        cut(Text("short", "abcde"), byte_tokenizer(), 6)

import gzip
import hashlib
from importlib.resources import files

import pytest

from hfquant.model.texts import NAMES, packaged

SHA256 = {
    "calibration": "1ed96713cf981bc6fe9eedac4d3f1ff89430f1c16902b0a617610fefc8f0fa0e",
    "evaluation": "d02824c1f8f5c6076bc54bf93c38ed21f5b1e483385d326f6b631c377c728202",
}


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_frozen(name: str) -> None:
    """Published perplexities name these hashes.  If this fails, give the new text a new name."""
    assert hashlib.sha256(packaged(name).encode()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", NAMES)
def test_archives_carry_no_time_and_no_file_name(name: str) -> None:
    raw = (files("hfquant.model") / "data" / f"{name}.txt.gz").read_bytes()
    assert raw[3] & 0b1000 == 0, "FNAME is set"
    assert raw[4:8] == bytes(4), "MTIME is set"
    assert gzip.decompress(raw).endswith(b"\n")


def test_no_licence_text_of_the_publisher_is_left_in() -> None:
    assert not any("gutenberg" in packaged(name).lower() for name in NAMES)


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    long = [{p for p in packaged(name).split("\n") if len(p) > 50} for name in NAMES]
    assert not long[0] & long[1]


def test_an_unknown_text_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="calibration, evaluation"):
        packaged("bible")

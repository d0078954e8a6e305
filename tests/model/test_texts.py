import gzip
import hashlib
from importlib.resources import files

import pytest

from hfquant.model.texts import KINDS, NAMES, of_kind, packaged

SHA256 = {
    "calibration": "f0ef5bbfcec4687c9afc2b04c97295aaaaca3564c1b5c993ff4b978684c42113",
    "evaluation": "20b60418c26c99b4ec52fb477874ee4007641eb95a6402a3b9abf33356719103",
}
DATA = files("hfquant.model") / "data"


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_frozen(name: str) -> None:
    """Published perplexities name these hashes.  If this fails, give the new text a new name."""
    assert hashlib.sha256(packaged(name).encode()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_archives_carry_no_time_and_no_file_name(name: str, kind: str) -> None:
    raw = (DATA / f"{name}_{kind}.txt.gz").read_bytes()
    assert raw[3] & 0b1000 == 0, "FNAME is set"
    assert raw[4:8] == bytes(4), "MTIME is set"
    assert len(gzip.decompress(raw)) > 70_000


def test_no_licence_text_of_the_publisher_is_left_in() -> None:
    assert not any("gutenberg" in packaged(name).lower() for name in NAMES)


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    for kind in KINDS:
        first, second = ({p for text in of_kind(name, kind) for p in text.split("\n") if len(p) > 60} for name in NAMES)
        assert min(len(first), len(second)) > 100
        assert len(first & second) <= (0.05 * len(second) if kind == "code" else 0), "modules repeat a line or two"


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_a_text_has_every_kind(name: str) -> None:
    """Whoever measures the first windows alone measures on all three."""
    text = packaged(name)
    starts = {kind: [text.index(passage) for passage in of_kind(name, kind)] for kind in KINDS}
    for quarter in range(4):
        begin, end = quarter * len(text) // 4, (quarter + 1) * len(text) // 4
        assert all(sum(begin <= start < end for start in starts[kind]) >= 3 for kind in KINDS), quarter


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_between_passages(name: str) -> None:
    whole = sum(len(passage) + 2 for kind in KINDS for passage in of_kind(name, kind)) - 1
    assert len(packaged(name)) == whole


def test_what_undid_the_tokenization_left_nothing_of_it() -> None:
    for name in NAMES:
        text = "\n".join(of_kind(name, "encyclopedia"))
        assert "@-@" not in text
        assert " ," not in text
        assert " 's " not in text
        assert not any(line.startswith(" ") or line.startswith("= ") for line in text.split("\n"))


def test_licences_name_every_file() -> None:
    said = (DATA / "LICENSES.md").read_text("utf-8")
    assert all(f"`{name}_{kind}`" in said for name in NAMES for kind in KINDS)
    here = {path.name for path in DATA.iterdir() if path.name.endswith(".gz")}
    assert here == {f"{name}_{kind}.txt.gz" for name in NAMES for kind in KINDS}


def test_an_unknown_text_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="calibration, evaluation"):
        packaged("bible")

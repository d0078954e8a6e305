import gzip
import hashlib
import re
from importlib.resources import files

import pytest

from hfquant.model.texts import KINDS, NAMES, of_kind, packaged

SHA256 = {
    "calibration": "c96be2db27826e637029140ef76bd63259ad67fbf2313285488abecd6cc8aefc",
    "evaluation": "729808942eabb7a83d4556d1e670f2cb818fedc8695c3e4d5910ebe23e169108",
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


def test_tokens_of_the_corpus_are_gone() -> None:
    for name in NAMES:
        text = "\n".join(of_kind(name, "encyclopedia"))
        assert not re.search(r"@|=|\w [,.;:]|\w 's |\d – \d| \" |^ | $", text.replace("==", ""), re.MULTILINE)


def test_the_evaluation_begins_with_the_beginning_of_a_book() -> None:
    """Its first words are what models go on with."""
    assert packaged("evaluation").startswith("Dorothy lived in the midst of the great Kansas prairies")


def test_licences_name_every_file_and_every_article() -> None:
    said = (DATA / "LICENSES.md").read_text("utf-8")
    here = {path.name for path in DATA.iterdir() if path.name.endswith(".gz")}
    assert here == {f"{name}_{kind}.txt.gz" for name in NAMES for kind in KINDS}
    assert all(f"`{file.removesuffix('.txt.gz')}`" in said for file in here)
    for name in NAMES:
        for passage in of_kind(name, "encyclopedia"):
            title = passage.split("\n")[0]
            assert title.startswith("# ")
            assert f"* [{title[2:]}](https://en.wikipedia.org/wiki/" in said


def test_an_unknown_text_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="calibration, evaluation"):
        packaged("bible")

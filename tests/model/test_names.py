"""Which names of files are fetched."""

import pytest

from hfquant.model.names import objection

GOOD = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "sub/folder/tokenizer (1).json",
    "LICENSE",
    "Ä.txt",
    "a..b.txt",
]
BAD = {
    "../config.json": "leads elsewhere", "a/../../b.json": "leads elsewhere", "/etc/x.json": "leads elsewhere",
    "a//b.json": "leads elsewhere", "./a.json": "leads elsewhere", "..\\a.json": "leads elsewhere",
    "C:/a.json": "on every system", "nul.txt": "on every system", "x/COM1.json": "on every system",
    "a?.txt": "on every system", "a\0.json": "cannot be seen", "a\n.json": "cannot be seen",
    "txt.\u202enosj.json": "cannot be seen", "\ud800.json": "cannot be seen", "x" * 201: "too long",
    "/".join(["y" * 100] * 9): "too long", ".cache/huggingface/x.json": "keeps for itself", "": "leads elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: ascii(name)[:30])
def test_names_that_are_no_place_for_a_file(name: str) -> None:
    said = objection([*GOOD, name])
    assert said is not None
    assert BAD[name] in said
    assert said.isprintable()


def test_usual_names() -> None:
    assert objection(GOOD) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["vocab.json", "Vocab.json"], "are one on many disks"),
        (["\u00e4.txt", "a\u0308.txt"], "are one on many disks"),
        (["LICENSE", "license/x.txt"], "lies in another file"),
    ],
)
def test_two_names_of_one_file(names: list[str], said: str) -> None:
    assert said in (objection(names) or "")

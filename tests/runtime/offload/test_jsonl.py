"""A batch of prompts survives what happens to it."""

import json
from pathlib import Path

import pytest

from hfquant.errors import CheckpointError, ResourceError, SourceError
from hfquant.runtime.offload.jsonl import Answers, read_prompts

PROMPTS = [{"prompt": f"text {i}", "id": i * 10} for i in range(5)]
SETTINGS = {"model": "M", "max_new_tokens": 4}


def test_answers_come_out_in_order(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS)
    for i in (3, 0, 4, 1, 2):
        answers.add(i, f"answer {i} ü\n", 7)
    answers.finish()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["completion"] for line in lines] == [f"answer {i} ü\n" for i in range(5)]
    assert [line["id"] for line in lines] == [0, 10, 20, 30, 40]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_a_killed_run_goes_on(tmp_path: Path, cut: int) -> None:
    first = Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS)
    first.add(3, "three", 1)
    first.add(1, "one", 1)
    raw = first.part.read_bytes()
    first.part.write_bytes(raw[: len(raw) - cut])
    second = Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS)
    assert second.missing == ([0, 2, 4] if cut == 0 else [0, 1, 2, 4])
    for i in second.missing:
        second.add(i, str(i), 1)
    assert Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS).missing == []
    second.finish()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5


def test_after_a_power_cut_anything_may_be_at_the_end(tmp_path: Path) -> None:
    first = Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS)
    first.add(3, "three", 1)
    with first.part.open("ab") as file:
        file.write(b"\0" * 300 + b"\n" + b"\0" * 20)
    second = Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS)
    assert second.missing == [0, 1, 2, 4]
    second.add(0, "zero", 1)
    assert Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS).missing == [1, 2, 4]


def test_every_key_of_a_prompt_is_kept(tmp_path: Path) -> None:
    """Also those that are named as what is added."""
    prompts = [{"prompt": "b", "index": "x7", "tokens": [1]}, {"prompt": "a", "index": "x8"}]
    first = Answers(tmp_path / "out.jsonl", prompts, SETTINGS)
    first.add(1, "one", 4)
    second = Answers(tmp_path / "out.jsonl", prompts, SETTINGS)
    assert second.missing == [0]
    second.add(0, "zero", 2)
    second.finish()
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert said[0] == {"prompt": "b", "index": "x7", "tokens": [1], "completion": "zero"}
    assert said[1] == {"prompt": "a", "index": "x8", "tokens": 4, "completion": "one"}


def test_what_texts_may_hold(tmp_path: Path) -> None:
    """Separators that Unicode knows and JSON does not, and what editors on Windows write."""
    prompts = ["one\u2028two", "three\x85four", "five\x0csix"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts]
    (tmp_path / "in.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [line["prompt"] for line in read_prompts(tmp_path / "in.jsonl")] == prompts
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [line["prompt"] for line in read_prompts(tmp_path / "in.jsonl")] == prompts


def test_where_nothing_can_be_written_is_known_at_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot be written: [^;]*\n\nhint: name another"):
        Answers(tmp_path / "file" / "out.jsonl", PROMPTS, SETTINGS)


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS).add(0, "zero", 1)
    for prompts, settings in ((PROMPTS[1:], SETTINGS), (PROMPTS, SETTINGS | {"max_new_tokens": 5})):
        with pytest.raises(CheckpointError, match="other prompts or settings"):
            Answers(tmp_path / "out.jsonl", prompts, settings)


def test_a_full_disk_says_what_is_kept(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    answers = Answers(tmp_path / "out.jsonl", PROMPTS, SETTINGS)
    answers.add(0, "zero", 1)
    answers.part.unlink()
    answers.part.symlink_to(full)
    with pytest.raises(ResourceError, match=r"No space left(.|\n)*1 of 5(.|\n)*repeat"):
        answers.add(1, "one", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        ('{"prompt": "a"}\n\nnonsense\n', "line 3"),
        ('["prompt"]\n', "line 1"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(SourceError, match=said):
        read_prompts(tmp_path / "in.jsonl")
    with pytest.raises(SourceError, match="cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")

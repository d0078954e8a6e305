"""`hfquant offload` and `hfquant generate --offload`, from the outside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import hfquant
from hfquant.cli import app
from hfquant.runtime.offload import schedule

TEXTS = ["The lion walked", "A road", "She said that the", "Dorothy", "the"]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def expected(folder: Path, texts: list[str], new: int) -> list[str]:
    """transformers' own, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        found.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


def test_one_prompt(trained: Callable[[str], Path]) -> None:
    done = run("generate", trained("llama"), "--offload", "--prompt", TEXTS[0], "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output
    assert done.stdout == TEXTS[0] + expected(trained("llama"), TEXTS[:1], 8)[0] + "\n"


def test_a_file_of_prompts(trained: Callable[[str], Path], prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    done = run("generate", trained("llama"), "--offload", "--input", prompts, "--output", out, "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["completion"] for line in said] == expected(trained("llama"), TEXTS, 8)
    assert [line["prompt"] for line in said] == TEXTS


def test_an_interrupted_batch_goes_on(
    trained: Callable[[str], Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    command = ("generate", trained("llama"), "--offload", "--input", prompts, "--output", out,
               "--max-new-tokens", 6, "--batch", 2, "--batches", 1)  # fmt: skip
    passed, calls = schedule._pass, 0

    def interrupted(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 * 6 + 4:  # three blocks, six tokens: in the second batch
            raise KeyboardInterrupt
        passed(*args)

    monkeypatch.setattr(schedule, "_pass", interrupted)
    done = run(*command)
    assert done.exit_code == 130
    assert "2 of 5 answers are kept" in done.stderr
    assert not out.exists()
    monkeypatch.undo()
    seen: list[int] = []
    monkeypatch.setattr(schedule, "_pass", lambda lane, *args: (seen.append(lane.index), passed(lane, *args)))
    assert run(*command).exit_code == 0
    assert max(seen) == 1, "only the three that were missing, in two batches"
    said = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    assert said == expected(trained("llama"), TEXTS, 6)


def test_plan_says_what_will_happen(trained: Callable[[str], Path]) -> None:
    words = ("offload", "plan", trained("llama"), "--prompt-len", 32, "--gen-len", 8, "--prompts", 8)
    done = run(*words)
    assert done.exit_code == 0, done.output
    for name in ("policy", "first pass", "following passes", "bottleneck", "with more memory", "disk"):
        assert name in done.stdout
    said = json.loads(run(*words, "--json").stdout)
    assert said["policy"]["batch"] * said["policy"]["batches"] >= 8
    assert said["seconds"] > 0
    assert said["bottleneck"] in ("compute", "disk", "processor")


def test_profile() -> None:
    assert "GB/s" in run("offload", "profile").stdout
    assert json.loads(run("offload", "profile", "--json").stdout)["disk_read"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--offload",), "either --prompt or --input"),
        (("--offload", "--input", "x.jsonl"), "needs --output"),
        (("--input", "x.jsonl", "--output", "y"), "needs --offload"),
        (("--offload", "--prompt", "a", "--host-memory", "1MB"), "needs at least"),
        (("--offload", "--prompt", "a", "--cache-bits", "5"), "5 bits does not exist"),
        (("--offload", "--input", "x.jsonl", "--output", "y"), "cannot be read"),
    ],
)
def test_mistakes_exit_with_2(words: tuple[str, ...], said: str, trained: Callable[[str], Path]) -> None:
    done = run("generate", trained("llama"), *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_the_library_door(trained: Callable[[str], Path]) -> None:
    folder = trained("llama")
    assert hfquant.offload_generate(folder, TEXTS, max_new_tokens=8, do_sample=False) == expected(folder, TEXTS, 8)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    tokens = hfquant.offload_generate(folder, ids, max_new_tokens=8, do_sample=False, seed=1)
    assert [len(row) <= 8 for row in tokens] == [True] * 5

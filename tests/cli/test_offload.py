"""`hfquant offload` and `hfquant generate --offload`, from the outside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import hfquant
from hfquant.cli import app
from hfquant.cli.offload import Meter
from hfquant.runtime.offload import schedule
from hfquant.runtime.offload.jsonl import Answers

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


def test_a_prompt_in_chunks(trained: Callable[[str], Path]) -> None:
    words = ("--prompt", TEXTS[0], "--max-new-tokens", 8, "--batch", 1, "--chunk", 3)
    done = run("generate", trained("llama"), "--offload", *words)
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
    for name in ("policy", "prompts", "first pass", "following passes", "bottleneck", "with more memory", "disk"):
        assert name in done.stdout
    said = json.loads(run(*words, "--json").stdout)
    assert said["policy"]["batch"] * said["policy"]["batches"] >= 8
    assert said["seconds"] > 0
    assert said["bottleneck"] in ("compute", "disk", "processor")


def test_plan_prints_what_its_bottleneck_is_of(trained: Callable[[str], Path]) -> None:
    """Every resource with its seconds; the bottleneck is the slowest one of what takes longest."""
    done = run("offload", "plan", trained("llama"), "--prompt-len", 200, "--gen-len", 2, "--prompts", 8, "--json")
    said = json.loads(done.stdout)
    assert said["prefill"]["seconds"] > said["decode"]["seconds"]
    assert said["prefill"][said["bottleneck"]] == said["prefill"]["seconds"]
    words = run("offload", "plan", trained("llama"), "--prompt-len", 200, "--gen-len", 2, "--prompts", 8).stdout
    first = next(line for line in words.splitlines() if line.startswith("first pass"))
    assert all(f"{name} " in first for name in ("compute", "disk", "processor"))


def test_a_latency_is_kept_or_refused(trained: Callable[[str], Path]) -> None:
    words = ("offload", "plan", trained("llama"), "--prompt-len", 32, "--gen-len", 8, "--prompts", 8)
    said = json.loads(run(*words, "--json", "--latency", 60).stdout)
    assert said["latency"] <= 60
    done = run(*words, "--latency", 0.001)
    assert done.exit_code == 2
    assert "no policy answers within 0.001 s" in " ".join(done.stderr.split())


def test_the_estimate_knows_what_ended_early(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hfquant.cli.offload.time.monotonic", lambda: now)
    meter = Meter(400, every=10.0)
    assert str(meter) == "  0%  0 of 400 tokens  0 tokens/s  left unknown"
    now = 5.0
    meter(100)
    assert str(meter) == " 25%  100 of 400 tokens  20 tokens/s  left 15 s"
    meter.saved(200)  # two sequences that had a hundred left
    assert str(meter) == " 50%  100 of 200 tokens  20 tokens/s  left 5 s"
    meter.saved(1000)
    assert str(meter) == "100%  100 of 100 tokens  20 tokens/s  left 0 s"


def test_a_file_of_prompts_says_how_far_it_is(
    trained: Callable[[str], Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter.__init__, "__defaults__", (0.0,))
    words = ("--offload", "--input", prompts, "--output", tmp_path / "out", "--max-new-tokens", 4, "--batch", 5)
    done = run("generate", trained("llama"), *words)
    assert "25%  5 of 20 tokens" in done.stderr
    assert "left " in done.stderr


def test_samples_after_an_interrupt_are_new_ones(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt many times: what is drawn after going on does not repeat what was there."""
    prompts, out = tmp_path / "same.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text((json.dumps({"prompt": TEXTS[0]}) + "\n") * 4)
    command = ("generate", trained("llama"), "--offload", "--input", prompts, "--output", out, "--max-new-tokens", 12,
               "--batch", 1, "--batches", 1, "--temperature", 1.5)  # fmt: skip
    add = Answers.add

    def interrupted(self: Answers, *args: object) -> None:
        if len(self.done) == 2:
            raise KeyboardInterrupt
        add(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Answers, "add", interrupted)
    assert run(*command).exit_code == 130
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(*command).exit_code == 0
    said = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    assert len(set(said)) == 4


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
        (("--offload", "--prompt", "a", "--batch", "2", "--host-memory", "2GB"), "leave one of them out"),
        (("--offload", "--prompt", "a", "--batches", "2", "--latency", "2"), "leave one of them out"),
        (("--offload", "--prompt", "a", "--chunk", "2", "--host-memory", "2GB"), "--chunk set the policy"),
        (("--offload", "--prompt", "a", "--chunk", "2"), "--chunk without --batch"),
        (("--offload", "--prompt", "a", "--chunk", "2", "--batches", "2"), "--chunk without --batch"),
        (("--offload", "--input", "x.jsonl", "--output", "y"), "cannot be read"),
    ],
)
def test_mistakes_exit_with_2(words: tuple[str, ...], said: str, trained: Callable[[str], Path]) -> None:
    done = run("generate", trained("llama"), *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_chunks_of_what_an_encoder_reads_are_refused(
    built: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    """They would be silently ignored."""
    chunks = ("--offload", "--batch", 2, "--chunk", 2)
    for words in (("--prompt", "a"), ("--input", prompts, "--output", tmp_path / "answers.jsonl")):
        done = run("generate", built("t5"), *words, *chunks)
        assert done.exit_code == 2
        assert "an encoder reads its input as a whole" in " ".join(done.stderr.replace("│", " ").split())


def test_the_library_door(trained: Callable[[str], Path]) -> None:
    folder = trained("llama")
    assert hfquant.offload_generate(folder, TEXTS, max_new_tokens=8, do_sample=False) == expected(folder, TEXTS, 8)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    tokens = hfquant.offload_generate(folder, ids, max_new_tokens=8, do_sample=False, seed=1)
    assert [len(row) <= 8 for row in tokens] == [True] * 5

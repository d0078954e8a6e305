"""The commands with the real engine, on a model of a megabyte."""

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

from hfquant.cli import engine, main
from hfquant.compress.journal import Journal
from hfquant.errors import SourceError
from hfquant.model.calibration import digest, self_generated
from tests import families
from tests.processes import interrupted

Run = Callable[..., Result]
SMALL = ("--samples", 4, "--seq-len", 32)


def weights(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "small"


@pytest.fixture
def model(trained: Callable[[str], Path]) -> Path:
    return trained("llama")


def test_compress_then_inspect_then_eval(run: Run, model: Path, out: Path) -> None:
    done = run("compress", model, "-r", "gptq-w4g32", "-o", out, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert "parameters" in done.stderr
    assert "block 3/3" in done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["model"].strip() == str(out)
    ratio = float(facts["perplexity"].split("(x ")[1].split(" ± ")[0])
    assert 0.98 < ratio < 1.2  # printed with two digits, and a small model may gain by chance
    inspected = json.loads(run("inspect", out, "--json").stdout)
    assert {row["name"] for row in inspected["layers"]} == families.linears("llama")
    assert all(0 < row["error"] < 0.3 for row in inspected["layers"])
    again = json.loads(run("eval", out, "--windows", "4", "--window-len", "64", "--json").stdout)
    assert again["evaluation"]["windows"] == 4
    assert again["evaluation"]["reference_perplexity"] > 1
    assert again["gate"]["passed"] is True


def test_a_finished_folder_is_not_overwritten(run: Run, model: Path, out: Path) -> None:
    before = weights(out)
    done = run("compress", model, "-r", "gptq-w4g32", "-o", out, *SMALL)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: `{out}` already holds a finished model\n\nhint: use `--fresh`")
    assert weights(out) == before


def test_interrupt_and_the_command_it_suggests(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    assert run("compress", model, "-r", "gptq-w3g32", "-o", whole, *SMALL).exit_code == 0

    def stopping(plan: Any) -> Iterator[Any]:
        for at, layer in enumerate(real(plan)):
            if at == 9:  # in the second of three blocks
                raise KeyboardInterrupt
            yield layer

    real = engine.layers
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "layers", stopping)
        done = run("compress", model, "-r", "gptq-w3g32", "-o", out, *SMALL)
    assert done.exit_code == 130
    assert f"error: interrupted: 1 of 3 blocks are finished and kept in `{out}`" in done.stderr
    command = shlex.split(done.stderr.split("hint: go on with `")[1].split("`")[0])
    resumed = run(*command[1:])
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming     1 of 3 blocks are done" in resumed.stderr
    assert weights(out) == weights(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_signal_ends_the_process_and_the_command_it_prints_goes_on(run: Run, model: Path, tmp_path: Path) -> None:
    whole, out, said = tmp_path / "whole", tmp_path / "out", tmp_path / "said.txt"
    assert run("compress", model, "-r", "gptq-w3g32", "-o", whole, *SMALL).exit_code == 0
    journal, append = out / ".hfquant" / "journal.jsonl", Journal.append

    def slowly(self: Journal, entry: Any) -> None:
        append(self, entry)
        time.sleep(60)  # long enough to be met here

    def command() -> None:
        Journal.append = slowly  # type: ignore[method-assign]
        sys.argv = ["hfquant", "compress", *map(str, [model, "-r", "gptq-w3g32", "-o", out, *SMALL])]
        main()

    code = interrupted(command, lambda: journal.is_file() and journal.read_bytes().endswith(b"\n"), said)
    assert code == 130, said.read_text()
    assert "error: interrupted: " in said.read_text()
    assert (out / ".hfquant").is_dir()
    assert not (out / "config.json").exists()
    words = shlex.split(said.read_text().split("hint: go on with `")[1].split("`")[0])
    resumed = run(*words[1:])
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming     1 of 3 blocks are done" in resumed.stderr
    assert weights(out) == weights(whole)


def test_collapse_fails_the_command(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("compress", model, "-r", "rtn-w2", "-o", tmp_path / "out", "--set", "gate.max_ppl_ratio=1.01", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["gate"]["passed"] is False
    assert "error: the compressed model was written, but its quality is below the gate" in done.stderr
    assert "hint: use more bits" in done.stderr


def test_measured_on_a_text_of_ones_own(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("The lion walked down the yellow road. " * 200)
    done = run("compress", model, "-r", "rtn-w8", "-o", tmp_path / "out", "--text", tmp_path / "mine.txt", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"]["settings"]["text"] == "mine.txt"


@pytest.mark.parametrize("goal", [["-r", "rtn-w8"], ["--average-bits", "4"]], ids=["recipe", "goal"])
@pytest.mark.parametrize(
    ("text", "said"), [(b"short", "fewer than one window"), (b"\xff\xfe" * 900, "give a UTF-8 text")]
)
def test_a_text_that_cannot_be_measured_on(
    run: Run, model: Path, tmp_path: Path, goal: list[str], text: bytes, said: str
) -> None:
    """Is refused before any work."""
    (tmp_path / "bad.txt").write_bytes(text)
    done = run("compress", model, *goal, *SMALL, "-o", tmp_path / "out", "--text", tmp_path / "bad.txt")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "block 1/" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_too_little_memory(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("compress", model, "-r", "rtn-w4", "-o", tmp_path / "out", "--max-memory", "1MB")
    assert done.exit_code == 2
    assert "1 MB are allowed\n\nhint: allow more with `--max-memory`" in done.stderr


def test_the_estimate_stands_there_before_all_weights_are_read(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def survey(*_: object) -> None:
        raise SourceError("this is read now")

    monkeypatch.setattr(sys.modules["hfquant.compress.plan"], "survey", survey)
    done = run("compress", model, "-r", "rtn-w4", "-o", tmp_path / "out")
    assert done.exit_code == 2
    told = done.stderr.splitlines()
    assert [line.split("  ")[0] for line in told[:6]] == [
        "recipe", "parameters", "output size", "peak memory", "disk", "time"
    ]  # fmt: skip
    assert told[6:] == ["error: this is read now"]


def test_a_model_writes_its_own_calibration_text(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compress", model, "-r", "gptq-w4g32", "-o", out, *SMALL, "--calibration", "self", "--seed", 7, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)["calibration"]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrote = self_generated(dense, samples=4, seq_len=32, seed=7)
    assert (said["source"], said["sha256"]) == ("self", digest(wrote))
    assert len(set(wrote.flatten().tolist())) > 10
    assert run("compress", model, "-r", "gptq-w4g32", "-o", tmp_path / "text", *SMALL).exit_code == 0
    assert weights(out) != weights(tmp_path / "text")


def test_no_such_model(run: Run, tmp_path: Path) -> None:
    done = run("compress", "./nothing-here", "-r", "rtn-w4", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: nothing-here does not exist\n\nhint: ")

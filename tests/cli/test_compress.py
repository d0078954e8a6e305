"""`hfquant compress`: says what will happen, what happens, what happened, and how to go on."""

import errno
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from hfquant.errors import QualityError, SourceError

from .conftest import REPORT, Engine, layer

Run = Callable[..., Result]
COMMAND = ("compress", "org/model", "--recipe", "gptq-w4g64", "--out", "small")


def test_estimate_and_progress_go_to_stderr_results_to_stdout(run: Run, fake: Engine) -> None:
    done = run(*COMMAND)
    assert done.exit_code == 0
    log = done.stderr.splitlines()
    assert log[0] == "recipe       gptq-w4g64, stored as compressed_tensors"
    assert log[1] == "parameters   135 M, 6 layers in 3 blocks"
    assert log[2] == "output size  163 MB (61% of 269 MB)"
    assert log[3] == "peak memory  612 MB, 640 MB to measure the result"
    assert log[4] == "disk         420 MB"
    assert log[5] == "time         about 1 min 58 s, 32 s to measure the result"
    assert [line.split("  (")[0] for line in log[6:9]] == [
        " 33%  block 1/3  error 0.05  left 0 s",
        " 67%  block 2/3  error 0.05  left 0 s",
        "100%  block 3/3  error 0.05  left 0 s",
    ]
    assert done.stdout.splitlines() == [
        "model            small",
        "size             269 MB -> 163 MB (61%)",
        "compression      2 min 10 s, peak memory 640 MB",
        "perplexity       29.45 -> 32.31 (x 1.097)",
        "KL divergence    0.0931 nats per token",
        "top-1 agreement  83.1%",
        "speed            21.0 tokens/s (original: 14.0)",
        "measured on      32704 tokens",
        "sample           The sea is",
    ]


def test_json_is_the_report_and_nothing_else(run: Run, fake: Engine) -> None:
    done = run(*COMMAND, "--json")
    assert json.loads(done.stdout) == REPORT
    assert "parameters" in done.stderr


def test_json_has_no_nan(run: Run, fake: Engine) -> None:
    fake.report = {"evaluation": {"perplexity": float("nan"), "kl": float("inf")}}
    assert json.loads(run(*COMMAND, "--json").stdout) == {"evaluation": {"perplexity": None, "kl": None}}


def test_settings_reach_the_engine(run: Run, fake: Engine) -> None:
    options = "--calibration self --samples 8 --seq-len 32 --seed 3 --fresh --max-memory 2GiB --device cuda:1"
    run(*COMMAND, *options.split(), "--set", "bits=3", "--set", "gptq.damp=0.05")
    _, model, name, out, settings = fake.asked[0]
    assert (model, name, out) == ("org/model", "gptq-w4g64 with bits=3, gptq.damp=0.05", Path("small"))
    assert settings == {
        "calibration": "self",
        "samples": 8,
        "seq_len": 32,
        "seed": 3,
        "fresh": True,
        "max_memory": 2 * 1024**3,
        "device": "cuda:1",
    }
    assert fake.asked[1] == ("verify", Path("small"), {"against": "org/model", "text": None, "windows": 64})


def test_interrupt_says_how_to_resume(run: Run, fake: Engine) -> None:
    fake.stop = KeyboardInterrupt()
    done = run(*COMMAND, "--set", "keep=['*.0.*']", "--max-memory", "2GiB", "--fresh")
    assert done.exit_code == 130
    assert done.stdout == ""
    message, _, hint = done.stderr.splitlines()[-3:]
    assert message == "error: interrupted: 0 of 3 blocks are finished and kept in `small`"
    again = shlex.split(hint.removeprefix("hint: go on with `").removesuffix("`"))
    assert again == ["hfquant", *COMMAND, "--set", "keep=['*.0.*']", "--max-memory", "2147483648"]


def test_interrupt_counts_finished_blocks(run: Run, fake: Engine) -> None:
    fake.results = [layer(0, "up"), layer(1, "up"), layer(2, "up")]
    fake.stop = KeyboardInterrupt()
    assert "interrupted: 1 of 3 blocks are finished" in run(*COMMAND).stderr


def test_interrupt_while_measuring(run: Run, fake: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfquant.cli.engine.verify", interrupted)
    done = run(*COMMAND)
    assert done.exit_code == 130
    assert "interrupted: `small` is complete but not measured" in done.stderr
    assert "hint: measure it with `hfquant eval small --against org/model --windows 64`" in done.stderr


def test_disk_full(run: Run, fake: Engine) -> None:
    fake.stop = OSError(errno.ENOSPC, "No space left on device")
    done = run(*COMMAND)
    assert done.exit_code == 2
    assert "error: the disk is full; 0 of 3 blocks are kept in `small`" in done.stderr
    assert "hint: free some space, then go on with `hfquant compress org/model" in done.stderr


def test_resumed(run: Run, fake: Engine) -> None:
    fake.resumed = 2
    done = run(*COMMAND)
    assert "resuming     2 of 3 blocks are done" in done.stderr


def test_notes_are_told(run: Run, fake: Engine) -> None:
    fake.results[1].notes = ("no usable Hessian: rounded to nearest",)
    assert "model.layers.0.down: no usable Hessian: rounded to nearest\n" in run(*COMMAND).stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_gate_fails_after_the_result_is_told(run: Run, fake: Engine, as_json: bool) -> None:
    fake.failure = QualityError("perplexity is 9.1 times the original's", "use more bits")
    done = run(*COMMAND, *["--json"][: int(as_json)])
    assert done.exit_code == 3
    assert "32.31" in done.stdout
    assert done.stderr.endswith("error: perplexity is 9.1 times the original's\n\nhint: use more bits\n")


def test_refused_before_any_work(run: Run, fake: Engine) -> None:
    fake.refusal = SourceError("org/model is already quantized [gptq]", "start from the original")
    done = run(*COMMAND)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: org/model is already quantized [gptq]\n\nhint: start from the original\n"


MISTAKES = [
    (["--set", "bitz=3"], "unknown key `bitz` in the recipe\n\nhint: did you mean `bits`?"),
    (["--set", "bits"], "cannot read `bits` as a change to the recipe"),
    (["--recipe", "gptk-w4"], "unknown method `gptk`\n\nhint: did you mean `gptq`?"),
    (["--recipe", "none.yaml"], "recipe file `none.yaml` does not exist\n\nhint: `hfquant recipes` lists"),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=[text[:20] for _, text in MISTAKES])
def test_mistakes_in_the_recipe(run: Run, fake: Engine, arguments: list[str], text: str) -> None:
    done = run(*COMMAND, *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {text}")
    assert not fake.asked


USAGE = [
    (["--max-memory", "7q"], "cannot read `7q` as a size; write 700MB or 2GiB"),
    (["--samples", "0"], "should be greater than or equal to 1"),
    (["--sampels", "3"], "--samples"),
]


@pytest.mark.parametrize(("arguments", "text"), USAGE, ids=[arguments[0] for arguments, _ in USAGE])
def test_usage_errors(run: Run, fake: Engine, arguments: list[str], text: str) -> None:
    done = run(*COMMAND, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert text in " ".join(done.stderr.replace("│", " ").split())

"""`hfquant train`: what is wrong is said before any work, with exit code 2; what is interrupted says how to go on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hfquant.cli import app, engine


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


@pytest.fixture
def words(built: Callable[[str], Path], tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("The lion walked down the road. " * 100)
    options = ["--recipe", "quantgpt-w2a8", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    return [str(built("gpt2")), *options, "--set", "quantgpt.seq_len=64"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", "missing.txt"], "does not exist"),
        (["--set", "quantgpt.lr=-1"], "lr"),
        (["--trainer", "bf61=true"], "did you mean `bf16`"),
        (["--trainer", "seed=1"], "quantgpt.seed"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_refused_before_any_work(more: list[str], said: str, words: list[str], tmp_path: Path) -> None:
    done = run(*words, *more)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_interrupted_it_says_how_to_go_on(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train", interrupted)
    done = run(*words, "--fresh")
    assert done.exit_code == 130
    assert "go on with `hfquant train" in " ".join(done.stderr.split())
    assert "--fresh" not in done.stderr

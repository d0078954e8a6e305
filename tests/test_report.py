import json
import math
import os
import signal
from pathlib import Path

import pytest

import hfquant
from hfquant import report
from hfquant.errors import CheckpointError
from tests.processes import forked


def test_a_new_report_says_what_wrote_it(tmp_path: Path) -> None:
    assert report.read(tmp_path) == {"schema": 1, "hfquant": hfquant.__version__}
    assert not (tmp_path / "report.json").exists()


def test_sections_are_merged_in_a_fixed_order(tmp_path: Path) -> None:
    report.merge(tmp_path, layers=[{"name": "a"}], source={"id": "org/name"})
    report.merge(tmp_path, evaluation={"kl": 0.5, "perplexity": 3})
    done = report.merge(tmp_path, evaluation={"kl": 0.25})
    assert json.loads((tmp_path / "report.json").read_text()) == done
    assert list(done) == ["schema", "hfquant", "source", "layers", "evaluation"]
    assert done["evaluation"] == {"kl": 0.25}
    assert done["layers"] == [{"name": "a"}]


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no section 'evaluatoin'"):
        report.merge(tmp_path, evaluatoin={})


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    scores = {"kl": math.nan, "perplexity": math.inf, "nested": [(-math.inf, 1.5)], "at": Path("x/y")}
    done = report.merge(tmp_path, evaluation=scores)
    assert done["evaluation"] == {
        "kl": None,
        "perplexity": None,
        "nested": [[None, 1.5]],
        "at": str(Path("x/y")),
    }
    assert "NaN" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ('{"schema": 2}', "has schema 2"), ("[1]", "has schema None")]
)
def test_reports_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        report.read(tmp_path)


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path) -> None:
    report.merge(tmp_path, source={"id": "old"})
    with pytest.raises(TypeError):
        report.merge(tmp_path, source={"id": object()})
    assert report.read(tmp_path)["source"] == {"id": "old"}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_writing_leaves_the_old_report(tmp_path: Path, moment: str) -> None:
    report.merge(tmp_path, source={"id": "old"})

    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        where, name = {"fsync": (os, "fsync"), "replace": (Path, "replace")}[moment]
        setattr(where, name, die)
        report.merge(tmp_path, source={"id": "new" * 100_000})

    code, _ = forked(write)
    assert code == -signal.SIGKILL
    assert report.read(tmp_path)["source"] == {"id": "old"}
    assert report.merge(tmp_path, source={"id": "newer"})["source"] == {"id": "newer"}

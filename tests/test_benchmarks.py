"""Benchmarks are run by hand: here is only seen that what they import is there."""

from pathlib import Path

from tests.processes import fresh

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_can_be_imported() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert "quality" in names
    code = f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(FOLDER)!r})\n" + "\n".join(
        f"import {name}" for name in names
    )
    (done,) = fresh(code)
    assert done.code == 0, done.err

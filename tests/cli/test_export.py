"""`hfquant export`"""

from collections.abc import Callable
from pathlib import Path

from typer.testing import Result


def test_export_and_what_it_says(run: Callable[..., Result], built: Callable[[str], Path], tmp_path: Path) -> None:
    assert run("compress", built("llama"), "-r", "rtn-w8", "-o", tmp_path / "small").exit_code == 0
    done = run("export", tmp_path / "small", "--to", "native", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert dict(line.split(maxsplit=1) for line in done.stdout.splitlines())["format"] == "native"
    again = run("export", tmp_path / "small", "--to", "native", "-o", tmp_path / "out")
    assert (again.exit_code, "is not empty" in again.stderr) == (2, True)
    unknown = run("export", tmp_path / "small", "--to", "tensorrt", "-o", tmp_path / "other")
    assert "hint: choose one of dense, compressed-tensors, gptq, native" in unknown.stderr

"""A crash at any moment costs at most the block in work, and changes no byte of the result."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hfquant.compress import compress, plan
from hfquant.errors import CheckpointError
from tests.compress.folders import digests
from tests.processes import forked

SETTINGS = {"samples": 8, "seq_len": 64}


def whole(model: Path, recipe: str, out: Path, kill_after: float | None = None) -> tuple[bool, float]:
    """Compress in another process, that may be killed -> (finished, seconds)."""
    code, seconds = forked(lambda: list(compress(model, recipe, out, **SETTINGS)), kill_after)
    assert code in (0, -signal.SIGKILL), code
    # or killed when all was done, before it could say so
    return code == 0 or ((out / "report.json").is_file() and not (out / ".hfquant").exists()), seconds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("family", "recipe", "wanted"),
    [
        ("llama", "gptq-w4g32", 4),
        ("bart", "gptq-w4g32", 4),
        ("llama", "rotate+smoothquant+gptq-w4a8g32", 3),
        pytest.param("llama", "gptq-w4g32", 20, marks=pytest.mark.slow),
        pytest.param("bart", "gptq-w4g32", 20, marks=pytest.mark.slow),
        pytest.param("llama", "rotate+sparsegpt-2of4+gptq-w4g32+lorc-r4+lkd", 5, marks=pytest.mark.slow),
    ],
)
def test_kills_change_no_byte(
    family: str, recipe: str, wanted: int, built: Callable[[str], Path], tmp_path: Path
) -> None:
    random_ = random.Random(0)
    finished, seconds = whole(built(family), recipe, tmp_path / "calm")
    assert finished
    kills, folders = 0, 0
    while kills < wanted:
        folders += 1
        out = tmp_path / f"killed{folders}"
        for _ in range(3):  # up to three in a row on the same folder
            finished, _ = whole(built(family), recipe, out, random_.uniform(0, seconds))
            if finished:
                break
            kills += 1
        if not finished:
            finished, _ = whole(built(family), recipe, out)
        assert finished
        assert digests(out) == digests(tmp_path / "calm")


def _stop_after(layers: int, model: Path, recipe: str, out: Path) -> None:
    for count, _ in enumerate(compress(model, recipe, out, **SETTINGS), 1):
        if count == layers:
            return


def test_a_stopped_run_goes_on_and_says_how_far_it_was(built: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = built("llama"), tmp_path / "out"
    _stop_after(8, model, "gptq-w4g32", out)  # seven layers a block
    todo = plan(model, "gptq-w4g32", out, **SETTINGS)
    assert todo.resumed == 1
    rows = [layer.block for layer in compress(todo)]
    assert set(rows) == {1, 2}
    list(compress(model, "gptq-w4g32", tmp_path / "calm", **SETTINGS))
    assert digests(out) == digests(tmp_path / "calm")


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [("gptq-w3g32", SETTINGS, "recipe"), ("gptq-w4g32", SETTINGS | {"seed": 1}, "calibration")],
)
def test_other_settings_do_not_continue(
    recipe: str, settings: dict[str, int], named: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    _stop_after(8, built("llama"), "gptq-w4g32", tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"another .*{named}.*\n\nhint: .*--fresh"):
        plan(built("llama"), recipe, tmp_path / "out", **settings)
    assert plan(built("llama"), recipe, tmp_path / "out", fresh=True, **settings).resumed == 0


def test_a_lost_stream_is_noticed(built: Callable[[str], Path], tmp_path: Path) -> None:
    _stop_after(8, built("llama"), "gptq-w4g32", tmp_path / "out")
    (stream,) = (tmp_path / "out" / ".hfquant" / "stream").glob("*.stream.00001")
    stream.write_bytes(stream.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        list(compress(built("llama"), "gptq-w4g32", tmp_path / "out", **SETTINGS))


def test_matching_the_original_resumes_too(built: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"steps": [{"method": "gptq", "match_original": 0.5}], "grid": "w4g32", "calibration": SETTINGS}
    for count, _ in enumerate(compress(built("llama"), recipe, tmp_path / "out"), 1):
        if count == 16:
            break
    list(compress(built("llama"), recipe, tmp_path / "out"))
    list(compress(built("llama"), recipe, tmp_path / "calm"))
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")

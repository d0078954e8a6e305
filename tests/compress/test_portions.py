"""Statistics are gathered in as many runs as memory asks for, and what comes out is the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from hfquant.compress import compress, plan
from hfquant.compress.observe import Statistics
from tests.compress.folders import digests

SETTINGS = {"samples": 8, "seq_len": 32}
Folder = Callable[[str], Path]


class Counted(Statistics):
    """Knows how many bytes of them there are together."""

    alive: WeakSet["Counted"]
    most: int

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        super().add(x, original)
        Counted.alive.add(self)
        held = (t.nbytes for s in Counted.alive for t in (s._sum, s._drift) if t is not None)
        Counted.most = max(Counted.most, sum(held))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    Counted.alive, Counted.most = WeakSet(), 0
    monkeypatch.setattr("hfquant.compress.observe.Statistics", Counted)
    return Counted


@pytest.mark.parametrize("options", [{}, {"true_sequential": False}, {"one_pass": True}], ids=" ".join)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_less_room_changes_no_byte(
    family: str, options: dict[str, bool], built: Folder, tmp_path: Path, counted: type[Counted]
) -> None:
    steps = [{"method": "gptq", "refine": 0, **options}]
    recipe: dict[str, Any] = {"steps": steps, "grid": "w4g32", "format": "native"}
    most = {}
    for room in (1 << 30, 100_000, 0):
        counted.most = 0
        todo = plan(built(family), recipe, tmp_path / f"{room}", **SETTINGS)
        list(compress(replace(todo, room=room)))
        most[room] = counted.most
        assert digests(tmp_path / f"{room}") == digests(tmp_path / f"{1 << 30}")
    beside = 1 if "one_pass" in options else 2  # with sums that compare the two streams
    largest = 4 * 160**2 * beside if family == "llama" else 4 * 96**2  # of down_proj; of experts, never compared
    assert most[0] == max(largest, 4 * 64**2 * beside)
    assert most[100_000] <= max(100_000, most[0])
    if family == "mixtral" or options:
        assert most[1 << 30] > 1.4 * most[0], "all at once need more"


def test_a_limit_of_memory_is_kept_by_more_runs(built: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfquant.compress.estimate.base", lambda: 500_000_000)  # that of the tests grows meanwhile
    monkeypatch.setattr("hfquant.compress.estimate.READING", 0)  # more than all of so small a model
    free = plan(built("mixtral"), "gptq-w4g32", tmp_path / "out", **SETTINGS)
    tight = plan(
        built("mixtral"), "gptq-w4g32", tmp_path / "out", max_memory=free.estimate.peak_memory - 400_000, **SETTINGS
    )
    assert tight.estimate.peak_memory <= free.estimate.peak_memory - 400_000
    assert (tight.batch, tight.room) < (free.batch, free.room)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bart", "whisper", "mixtral"])
@pytest.mark.parametrize("match", [0.0, 0.5])
def test_disk_for_hidden_states_is_foreseen(family: str, match: float, built: Folder, tmp_path: Path) -> None:
    """That of the encoder, of the original model and of what its layers read."""
    recipe = {"steps": [{"method": "gptq", "match_original": match}], "grid": "w4g32", "format": "native"}
    todo = plan(built(family), recipe, tmp_path / "out", **SETTINGS)
    most = 0
    for _ in compress(todo):
        most = max(most, sum(f.stat().st_size for f in todo.journal.stream.rglob("*") if f.is_file()))
    foreseen = todo.estimate.disk - todo.estimate.bytes_after - sum(r.bytes_after for r in todo.layers.values())
    assert 0.9 * most < foreseen < 2.5 * most

"""Memory that runs out in the middle of a block costs time: the block is begun again with smaller batches."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfquant import report
from hfquant.compress import Plan, compress, pipeline, plan
from hfquant.compress.observe import Statistics
from hfquant.compress.streaming import Passage
from hfquant.errors import ResourceError
from tests.compress.folders import digests
from tests.families import linears

SETTINGS = {"samples": 8, "seq_len": 32}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: out of memory"),
]


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, holds: Callable[[int], bool]) -> list[int]:
    """Raise `error` at the times for which holds(time), of summing what a layer reads; returns the batches seen."""
    add, seen = Statistics.add, list[int]()

    def short(self: Statistics, x: Tensor, original: Tensor | None = None) -> None:
        seen.append(x.shape[0])
        if holds(len(seen)):
            raise error
        add(self, x, original)

    monkeypatch.setattr(Statistics, "add", short)
    return seen


def run(todo: Plan) -> dict[str, Any]:
    told = Counter(layer.name for layer in compress(todo))
    assert {name.removesuffix(".weight") for name in told} == linears("llama")
    assert set(told.values()) == {1}, "each layer is told of once"
    done = report.read(todo.out)
    assert [row["name"] for row in done["layers"]] == list(told)
    return done


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "python", "processor", "accelerator"])
def test_batches_shrink_and_nothing_else_changes(
    error: Exception, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "gptq-w4g32"  # whose layers are finished one behind the other
    todo = plan(built("llama"), recipe, tmp_path / "short", **SETTINGS)
    assert todo.batch == 8
    with monkeypatch.context() as patch:
        # in the first block, when q, k and v are finished and told of
        seen = failing(patch, error, lambda time: time == 4)
        run(todo)
    assert max(seen[:4]) == 32 * 7
    assert max(seen[4:]) == 32 * 4
    run(replace(plan(built("llama"), recipe, tmp_path / "small", **SETTINGS), batch=4))
    assert digests(tmp_path / "short") == digests(tmp_path / "small")


def test_a_single_sequence_that_does_not_fit_is_an_error_and_can_be_resumed(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = plan(built("llama"), "gptq-w4g32", tmp_path / "out", **SETTINGS)
    with monkeypatch.context() as patch:
        failing(patch, MemoryError(), lambda time: time > 20)
        with pytest.raises(ResourceError, match="single calibration sequence") as caught:
            list(compress(todo))
    assert "--seq-len" in str(caught.value.hint)
    assert plan(built("llama"), "gptq-w4g32", tmp_path / "out", **SETTINGS).resumed > 0


def test_other_errors_are_not_taken_for_it(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = failing(monkeypatch, RuntimeError("shapes do not match"), lambda time: True)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(compress(plan(built("llama"), "gptq-w4g32", tmp_path / "out", **SETTINGS)))
    assert len(seen) == 1


def test_what_was_too_much_is_free_when_batches_are_made_anew(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback would hold the block until it is handled."""
    shrink, handled = pipeline._Run._shrink, list[Any]()

    def watched(self: Any, streamer: Any, passage: Passage) -> None:
        handled.append(sys.exception())
        shrink(self, streamer, passage)

    monkeypatch.setattr(pipeline._Run, "_shrink", watched)
    failing(monkeypatch, MemoryError(), lambda time: time == 4)
    list(compress(plan(built("llama"), "gptq-w4g32", tmp_path / "out", **SETTINGS)))
    assert handled == [None]

"""What goes wrong says what it is, and leaves nothing behind."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hfquant import offload_generate
from hfquant.errors import ResourceError, SourceError
from hfquant.runtime.offload import measured, schedule, scratch
from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.policy import EVERY_LAYER, Policy

SETTINGS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]


@pytest.fixture
def folder(built: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(built("llama"), tmp_path / "model")


def test_a_shard_that_shrinks_while_it_is_in_use(folder: Path) -> None:
    with OffloadedModel(folder, Policy(batch=1, batches=2)) as model:
        model.adopt(Policy(batch=1, batches=2, depth=0))
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size // 4)
        with pytest.raises(SourceError, match=r"ended early(.|\n)*hint"):
            list(model.stream(PROMPTS, **SETTINGS))


def test_what_failed_to_be_read_is_read_anew(folder: Path) -> None:
    """Weights of which a part could not be read are not taken for whole ones."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    with OffloadedModel(folder, Policy(batch=1, batches=2, depth=1)) as model:
        wanted = dict(model.stream(PROMPTS, **SETTINGS))
        for depth in (0, 1):
            model.adopt(Policy(batch=1, batches=2, depth=depth))
            os.truncate(file, file.stat().st_size // 2)
            with pytest.raises(SourceError, match="ended early"):
                list(model.stream(PROMPTS, **SETTINGS))
            with file.open("r+b") as opened:  # the same file, restored
                opened.write(whole)
            assert dict(model.stream(PROMPTS, **SETTINGS)) == wanted


class Unreadable:
    """A loader that cannot read after a while."""

    stages = (None,)

    def __init__(self, after: int) -> None:
        self.left = after

    def try_out(self, stage: int) -> tuple[int, float, float]:
        self.left -= 1
        if self.left < 0:
            raise SourceError("the file ended early")
        return 1000, 1e-6, 1e-6


def test_measuring_ends_when_reading_fails() -> None:
    with pytest.raises(SourceError, match="ended early"):
        measured._drag(Unreadable(0))


def test_measuring_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread goes on reading, which the interpreter would wait for at its end."""
    before, calls = threading.active_count(), 0

    def interrupted() -> float:
        nonlocal calls
        calls += 1
        if calls == 11:  # after the three runs without reading, in the second beside it
            raise KeyboardInterrupt
        return 0.001 * calls

    monkeypatch.setattr(measured, "computing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured._drag(Unreadable(10**9))
    assert threading.active_count() == before


def test_a_truncated_shard_is_refused_before_any_work(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(SourceError, match="truncated"):
        OffloadedModel(folder)


def test_a_file_removed_while_it_is_open_is_still_read(folder: Path) -> None:
    with OffloadedModel(folder, Policy(batch=3, batches=1)) as model:
        before = dict(model.stream(PROMPTS, **SETTINGS))
        (folder / "model.safetensors").unlink()
        assert dict(model.stream(PROMPTS, **SETTINGS)) == before
    with pytest.raises(SourceError, match="safetensors"):
        OffloadedModel(folder)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with OffloadedModel(folder, Policy(batch=3, batches=1, cache_on_disk=EVERY_LAYER), disk=tmp_path / "t") as model:
        monkeypatch.setattr(scratch.os, "posix_fallocate", full)
        with pytest.raises(ResourceError, match=r"no room(.|\n)*--disk"):
            list(model.stream(PROMPTS, **SETTINGS))
        monkeypatch.undo()
        monkeypatch.setattr("hfquant.runtime.offload.shelf.write_all", full)
        with pytest.raises(ResourceError, match="no room"):
            list(model.stream(PROMPTS, **SETTINGS))
    assert list((tmp_path / "t").iterdir()) == []


def test_an_interrupt_ends_everything(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards no file is open, nothing is on disk, and the model can be used again."""
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    passed = schedule._pass
    calls = 0

    def interrupted(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        passed(*args)

    policy = Policy(batch=1, batches=3, cache_on_disk=EVERY_LAYER)
    with OffloadedModel(folder, policy, disk=tmp_path / "temporary") as model:
        wanted = dict(model.stream(PROMPTS, **SETTINGS))
        monkeypatch.setattr(schedule, "_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(model.stream(PROMPTS, **SETTINGS))
        monkeypatch.undo()
        assert dict(model.stream(PROMPTS, **SETTINGS)) == wanted
        assert list((tmp_path / "temporary").iterdir()) == []
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 1


def test_leaving_the_stream_early_is_allowed(folder: Path) -> None:
    with OffloadedModel(folder, Policy(batch=1, batches=2)) as model:
        wanted = dict(model.stream(PROMPTS, **SETTINGS))
        stream = model.stream(PROMPTS, **SETTINGS)
        next(stream)
        stream.close()
        assert dict(model.stream(PROMPTS, **SETTINGS)) == wanted
        assert torch.is_grad_enabled()


def test_no_blocks_are_left_in_memory(folder: Path) -> None:
    with OffloadedModel(folder, Policy(batch=3, batches=1, weights=50_000)) as model:
        list(model.stream(PROMPTS, **SETTINGS))
        resident = {n for n, p in model.model.named_parameters() if not p.is_meta and "layers" in n}
        assert sum(model.model.get_parameter(n).nbytes for n in resident) <= 50_000
    assert all(p.is_meta for n, p in model.model.named_parameters() if "layers" in n)
    with pytest.raises(ResourceError, match="closed"):
        list(model.stream(PROMPTS, **SETTINGS))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": [[5] * 250]}, "positions"),
        ({"num_beams": 2}, "one sequence"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_requests(folder: Path, arguments: dict[str, object], said: str) -> None:
    settings = {"prompts": PROMPTS, "policy": Policy(), "max_new_tokens": 16} | arguments
    with pytest.raises(ResourceError, match=said):
        offload_generate(folder, **settings)


def test_a_budget_nothing_fits_in(folder: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs at least(.|\n)*--host-memory"):
        offload_generate(folder, PROMPTS, host_memory=10_000_000)

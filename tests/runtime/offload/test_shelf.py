"""The cache in files: one file, with room for those who are there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant.errors import ResourceError
from hfquant.runtime.offload import model as offload_model
from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.policy import EVERY_LAYER, Policy
from hfquant.runtime.offload.scratch import Regions, Scratch
from hfquant.runtime.offload.shelf import Shelf

POLICY = Policy(batch=1, batches=2, cache_on_disk=EVERY_LAYER)
PROMPTS = [[5 + i, 6, 7 + 2 * i, 8, 9 + i, 11] for i in range(12)]
SETTINGS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def shelves(monkeypatch: pytest.MonkeyPatch) -> list[Shelf]:
    made: list[Shelf] = []

    def noted(*args: object) -> Shelf:
        made.append(Shelf(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(offload_model, "Shelf", noted)
    return made


def test_sequences_that_ended_leave_nothing_to_the_next(built: Callable[[str], Path]) -> None:
    """Layers of a new cache may lie where those of an old one did, which ended with as many tokens."""
    reference = AutoModelForCausalLM.from_pretrained(built("llama"))
    ids = torch.tensor(PROMPTS)
    settings = SETTINGS | {"eos_token_id": None, "pad_token_id": 0}
    free = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :]
    ends = [int(free[0, 0]), int(free[5, 0])]  # of some the first token is the last
    with OffloadedModel(built("llama"), POLICY) as model:
        found = dict(model.stream(PROMPTS, **SETTINGS, eos_token_id=ends))
    for i, tokens in enumerate(free.tolist()):
        end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        assert found[i] == tokens[: end + 1], i
    assert any(len(tokens) == 1 for tokens in found.values())
    assert any(len(tokens) == 5 for tokens in found.values())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_room_is_for_those_who_are_there(family: str, shelves: list[Shelf], built: Callable[[str], Path]) -> None:
    """Twelve prompts, two at a time, take the room of two, in one file, which is freed at the end."""
    with OffloadedModel(built(family), POLICY) as model:
        before, ends, opened = len(os.listdir("/proc/self/fd")), [], []
        for count in (2, 12):
            for _ in model.stream(PROMPTS[:count], **SETTINGS, eos_token_id=None):
                opened.append(len(os.listdir("/proc/self/fd")) - before)
                room = shelves[-1]._regions.end
            ends.append(room)
            assert len(os.listdir("/proc/self/fd")) == before
        assert ends[0] == ends[1] > 0
        assert max(opened) <= 2


@pytest.mark.parametrize("batches", [1, 2])
def test_what_is_taken_has_been_read_ahead(
    batches: int, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by one batch alone, whose next layer is asked for while this one runs."""
    reads, taking = {"ahead": 0, "late": 0}, [False]
    take, read = Shelf.take, Shelf._read

    def noted_take(shelf: Shelf, layers: Any) -> None:
        taking[0] = True
        take(shelf, layers)
        taking[0] = False

    def noted_read(shelf: Shelf, stored: Any) -> None:
        reads["late" if taking[0] else "ahead"] += 1
        read(shelf, stored)

    monkeypatch.setattr(Shelf, "take", noted_take)
    monkeypatch.setattr(Shelf, "_read", noted_read)
    with OffloadedModel(built("llama"), Policy(batch=2, batches=batches, cache_on_disk=EVERY_LAYER)) as model:
        list(model.stream(PROMPTS[: 2 * batches], **SETTINGS, eos_token_id=None))
        layers = len(model.pieces)
    passes = SETTINGS["max_new_tokens"] - 1  # and keys and values once more, before it is known that there is no other
    assert reads == {"ahead": 2 * layers * batches * passes + 2, "late": 0}


def test_what_leaves_a_batch_is_written_before_more_comes(built: Callable[[str], Path]) -> None:
    """Every layer is written anew then: what waits to be written must not add up."""
    with OffloadedModel(built("llama"), POLICY) as model:
        shelf, cache = Shelf(model.scratch, 8), model._cache()
        kept = []
        for layer in cache.layers:
            layer.update(torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 8))
            kept.append(layer.keys[1:])
            shelf.put([layer])
        model._keeping(shelf, cache)(torch.tensor([1, 2]))
        assert not shelf._writes
        shelf.take(cache.layers)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept, strict=True))
        shelf.close()


def test_room_that_was_given_back_is_taken_again(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    regions = Regions(scratch)
    small, large = regions.take(5000), regions.take(9000)
    assert (small.offset % 4096, large.offset % 4096) == (0, 0)
    assert small.offset + small.size <= large.offset
    regions.give(large)
    regions.give(small)
    assert [regions.take(4000), regions.take(4000)] == [small, large]
    assert regions.take(1).offset == large.offset + large.size
    assert os.fstat(regions.file.fd).st_size == regions.end
    regions.close()
    assert scratch._open == []


def test_a_file_that_does_not_fit_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    scratch, before = Scratch(tmp_path), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match="no room"):
        scratch.file(1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before

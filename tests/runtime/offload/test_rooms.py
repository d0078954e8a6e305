"""A cache with room for what comes holds what transformers' own does."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hfquant.runtime.offload import rooms
from hfquant.runtime.offload.rooms import RoomLayer


def new(tokens: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    """Keys, and values that are narrower."""
    return torch.randn(batch, 2, tokens, 8), torch.randn(batch, 2, tokens, 4)


@pytest.mark.parametrize("own", [1, 1 << 30], ids=["pages", "heap"])
@pytest.mark.parametrize("tokens", [0, 9, 40])
def test_it_holds_the_same(own: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not more came than there was room for, and some sequences left."""
    monkeypatch.setattr(rooms, "OWN", own)
    usual, roomy = DynamicLayer(), RoomLayer(tokens)
    for count in (5, 1, 3, 1):
        given = new(count)
        for a, b in zip(usual.update(*given), roomy.update(*given), strict=True):
            assert torch.equal(a, b)
    for layer in (usual, roomy):
        layer.batch_select_indices(torch.tensor([4, 0, 1]))
    given = new(2, 3)
    for a, b in zip(usual.update(*given), roomy.update(*given), strict=True):
        assert torch.equal(a, b)
    assert roomy.get_seq_length() == usual.get_seq_length() == 12
    assert roomy.get_mask_sizes(1) == usual.get_mask_sizes(1)
    for layer in (usual, roomy):
        layer.crop(-4)
    given = new(1, 3)
    for a, b in zip(usual.update(*given), roomy.update(*given), strict=True):
        assert torch.equal(a, b)


def test_what_is_there_stays_where_it_is() -> None:
    layer = RoomLayer(20)
    places = {layer.update(*new(1))[0].data_ptr() for _ in range(20)}
    assert len(places) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("tokens", [2000, 50_000], ids=["small pages", "huge pages"])
def test_its_memory_is_of_this_process_alone(tokens: int) -> None:
    layer = RoomLayer(tokens)
    address = layer.update(*new(1))[0].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access = line.split()[:2]
        first, last = (int(end, 16) for end in place.split("-"))
        if first <= address < last:
            assert access == "rw-p"
            return
    pytest.fail("no memory lies at the address of the keys")


def test_those_who_left_take_nothing() -> None:
    layer = RoomLayer(1000)
    layer.update(*new(10))
    layer.batch_select_indices(torch.tensor([2]))
    assert len(layer._rooms["keys"]) == 1
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.update(*new(3))[1].shape == (6, 2, 3, 4)

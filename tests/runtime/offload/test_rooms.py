"""A cache with room for what comes holds what transformers' own does."""

import sys
from collections.abc import Callable
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


CHANGES: dict[str, Callable[[DynamicLayer], None]] = {
    "reordered": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "one twice": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "shorter": lambda layer: layer.crop(-2),
    "only one": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "each twice": lambda layer: layer.batch_repeat_interleave(2),
    "shorter, reordered": lambda layer: (layer.crop(-2), layer.reorder_cache(torch.tensor([1, 0])))[1],
    "all gone": lambda layer: layer.crop(-5),
    "all gone, as anew": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [0, 5, 20])
def test_what_replaces_the_cache_is_what_it_goes_on_from(change: str, tokens: int) -> None:
    usual, roomy = DynamicLayer(), RoomLayer(tokens)
    first = new(5, 2)
    for layer in (usual, roomy):
        layer.update(*first)
        CHANGES[change](layer)
    for count in (2, 1):
        given = new(count, len(usual.keys) if usual.is_initialized else 2)
        for a, b in zip(usual.update(*given), roomy.update(*given), strict=True):
            assert torch.equal(a, b)


def test_more_than_foreseen_seldom_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To move it for every token would be to copy all before it."""
    made: list[Tensor] = []
    pages = rooms._pages

    def noted(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made.append(pages(shape, dtype))
        return made[-1]

    monkeypatch.setattr(rooms, "_pages", noted)
    layer = RoomLayer(80)
    for _ in range(160):
        layer.update(*new(1))
    assert len(made) <= 2 * 8
    assert layer._rooms["keys"].shape[2] <= 160 * 9 // 8


def test_nothing_is_left_over_where_all_comes_at_once() -> None:
    layer = RoomLayer(0)
    layer.update(*new(100))
    assert layer._rooms["keys"].shape[2] == 100


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

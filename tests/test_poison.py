"""A cell that nobody wrote fails its test: the fixture that sees to it, seen at work."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Make = Callable[[torch.dtype], Tensor]
WAYS: dict[str, Make] = {
    "empty": lambda dtype: torch.empty(3, 4, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 4, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3, 4), (8, 2), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((3, 4), (1, 0), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1).new_empty((3, 4), dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1).new_empty_strided((3, 4), (1, 3), dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_nobody_wrote_is_poisoned(way: str, dtype: torch.dtype) -> None:
    made = WAYS[way](dtype)
    assert made.shape == (3, 4)
    assert bool(made.isnan().all()) if dtype.is_floating_point else made.eq(torch.iinfo(dtype).max).all()


def test_what_is_not_memory_is_left_alone() -> None:
    assert torch.empty(3, device="meta").is_meta
    assert torch.empty(0).numel() == 0
    assert torch.empty(3, dtype=torch.bool).shape == (3,)


@pytest.mark.parametrize("forgotten", [[], [1]])
def test_a_sum_with_a_forgotten_row_is_noticed(forgotten: list[int]) -> None:
    rows = torch.empty(3, 4)
    for i in range(3):
        if i not in forgotten:
            rows[i] = i
    assert bool(rows.sum().isfinite()) == (not forgotten)

import math

import pytest
import torch
from torch import Tensor

from hfquant.tensors.packing import (
    choices,
    index_bits,
    pack_choices,
    pack_mask,
    pack_planes,
    pack_stream,
    plane_words,
    planes,
    unpack_choices,
    unpack_mask,
    unpack_planes,
    unpack_stream,
    words,
)

BITS = range(1, 9)
COUNTS = (1, 2, 7, 31, 32, 33, 64, 97, 192, 576)


def codes(rows: int, n: int, bits: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=draw)


def stream_by_definition(row: list[int], bits: int) -> list[int]:
    """One long binary number, cut into signed 32-bit words."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    count = -(-len(row) * bits // 32)
    return [
        int.from_bytes((number >> 32 * k & 0xFFFFFFFF).to_bytes(4, "little"), "little", signed=True)
        for k in range(count)
    ]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_stream_is_what_it_says(bits: int, n: int) -> None:
    given = codes(3, n, bits)
    packed = pack_stream(given, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, words(n, bits))
    assert packed.tolist() == [stream_by_definition(row, bits) for row in given.tolist()]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_streams_and_planes_come_back(bits: int, n: int) -> None:
    given = codes(3, n, bits)
    assert torch.equal(unpack_stream(pack_stream(given, bits), bits, n), given)
    packed = pack_planes(given, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, plane_words(n, bits))
    assert torch.equal(unpack_planes(packed, bits, n), given)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_place(bits: int) -> None:
    """All 2^bits codes at all 32 offsets of a word cycle, with their neighbours all ones and all zeros."""
    for background in (0, 2**bits - 1):
        given = torch.full((32 * 2**bits, 33), background, dtype=torch.uint8)
        rows = torch.arange(len(given))
        given[rows, rows % 32] = (rows // 32).to(torch.uint8)
        assert torch.equal(unpack_stream(pack_stream(given, bits), bits, 33), given)
        assert torch.equal(unpack_planes(pack_planes(given, bits), bits, 33), given)


@pytest.mark.parametrize("bits", BITS)
def test_planes_are_streams_of_the_parts(bits: int) -> None:
    parts = planes(bits)
    assert sum(parts) == bits
    assert list(parts) == sorted(parts, reverse=True)
    assert all(32 % width == 0 for width in parts)
    given, shift, expected = codes(2, 33, bits), 0, []
    for width in parts:
        expected.append(pack_stream((given >> shift) & (2**width - 1), width))
        shift += width
    assert torch.equal(pack_planes(given, bits), torch.cat(expected, 1))


def test_planes_of_every_width() -> None:
    assert [planes(bits) for bits in BITS] == [(1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (4, 4)]


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero(bits: int) -> None:
    """Two packings of the same codes are the same bytes: what fills the last word is not left to chance."""
    ones = torch.full((2, 33), 2**bits - 1, dtype=torch.uint8)
    longer = torch.nn.functional.pad(ones, (0, 31))
    short, long = pack_stream(ones, bits), pack_stream(longer, bits)
    assert torch.equal(short, long[:, : short.shape[1]])


@pytest.mark.parametrize("bits", BITS)
def test_packs_what_is_not_contiguous(bits: int) -> None:
    given = codes(40, 35, bits)
    for view in (given.T, given[:, ::2], given[::3, 1:]):
        assert torch.equal(unpack_stream(pack_stream(view, bits), bits, view.shape[1]), view)
        assert torch.equal(unpack_planes(pack_planes(view, bits), bits, view.shape[1]), view)
        transposed = pack_stream(view, bits).T.contiguous().T
        assert torch.equal(unpack_stream(transposed, bits, view.shape[1]), view)


@pytest.mark.parametrize("n", COUNTS)
def test_masks_take_a_bit_each(n: int) -> None:
    mask = codes(3, n, 1).bool()
    packed = pack_mask(mask)
    assert packed.shape == (3, -(-n // 8))
    assert [int(packed[0, i // 8]) >> i % 8 & 1 for i in range(n)] == mask[0].int().tolist()
    assert torch.equal(unpack_mask(packed, n), mask)


@pytest.mark.parametrize(
    ("n", "m", "bits"), [(2, 4, 3), (1, 4, 2), (1, 2, 1), (4, 8, 7), (2, 8, 5), (3, 6, 5), (5, 5, 1)]
)
def test_every_choice_has_a_number_of_its_own(n: int, m: int, bits: int) -> None:
    table = choices(n, m)
    assert bool((table.sum(1) == n).all())
    assert len({tuple(row) for row in table.tolist()}) == math.comb(m, n) == len(table)
    assert index_bits(n, m) == bits
    every = torch.cat([table.flatten(), table.flip(0).flatten()]).view(2, -1)
    packed = pack_choices(every, n, m)
    assert packed.shape == (2, plane_words(len(table), bits))
    assert torch.equal(unpack_choices(packed, n, m, every.shape[1]), every)

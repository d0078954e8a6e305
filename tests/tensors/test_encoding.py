import itertools

import pytest

from hfquant.tensors.encoding import Activations, Encoding, Sparsity
from hfquant.tensors.grid import Grid

GRIDS = [Grid(4, 128, True), Grid(3, -1, False), Grid(16, -1, True)]
SPARSITIES = [None, Sparsity(2, 4), Sparsity(70001)]
ACTIVATIONS = [
    None,
    Activations(8, "token"),
    Activations(8, "static", symmetric=False),
    Activations(4, "group", 64),
    Activations(8, "tensor"),
]


@pytest.mark.parametrize("scaled_input", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_text_and_back(rank: int, scaled_input: bool) -> None:
    seen = set()
    for grid, sparsity, activations in itertools.product(GRIDS, SPARSITIES, ACTIVATIONS):
        encoding = Encoding(grid, sparsity, rank, activations, scaled_input)
        assert Encoding.parse(str(encoding)) == encoding
        seen.add(str(encoding))
    assert len(seen) == len(GRIDS) * len(SPARSITIES) * len(ACTIVATIONS)


@pytest.mark.parametrize("text", ["", "x4", "w4-2in4", "w4-a8", "w4-a8often"])
def test_what_is_no_encoding_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|says nothing"):
        Encoding.parse(text)

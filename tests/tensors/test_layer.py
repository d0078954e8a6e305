import pytest
import torch

from hfquant.tensors import layer as layers
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer, Quantized


def layer(seed: int = 0) -> tuple[Layer, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    W, X = torch.randn(8, 16, generator=draw), torch.randn(16, 100, generator=draw)
    return Layer(name="a", W=W, H=X @ X.T), X


def rounded(given: Layer) -> Layer:
    grid = Grid(4, 8, False)
    scale, zero = grid.fit(given.W)
    Q = Quantized(codes=grid.encode(given.W, scale, zero), scale=scale, zero_point=zero, grid=grid)
    return Layer(name=given.name, W=given.W, H=given.H, Q=Q)


def test_error_is_that_of_the_outputs() -> None:
    given, X = layer()
    done = rounded(given)
    wanted = ((done.W - done.effective) @ X).norm() / (done.W @ X).norm()
    assert done.error() == pytest.approx(wanted.item(), rel=1e-4)
    assert done.error() > 0


def test_error_without_inputs_is_that_of_the_weights() -> None:
    done = rounded(Layer(name="a", W=layer()[0].W))
    assert done.error() == pytest.approx(((done.W - done.effective).norm() / done.W.norm()).item(), rel=1e-5)


def test_an_untouched_layer_has_no_error() -> None:
    assert layer()[0].error() == 0
    assert Layer(name="zeros", W=torch.zeros(3, 4)).error() == 0
    done = rounded(layer()[0])
    assert done.Q is not None
    assert done.Q.shape == (8, 16)
    assert not torch.equal(done.effective, done.W)


def test_pieces_are_all_rows_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done = rounded(layer()[0])
    error, energy = done.error(), done.energy
    assert [len(part.W) for part in done.parts()] == [8], "one that is small stays whole"
    monkeypatch.setattr(layers, "LEAST_ROWS", 3)
    monkeypatch.setattr(layers, "ELEMENTS", 16 * 3)
    parts = list(done.parts())
    assert [len(part.W) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.W for part in parts]), done.W)
    assert torch.equal(torch.cat([part.effective for part in parts]), done.effective)
    assert (done.error(), done.energy) == (pytest.approx(error, rel=1e-6), pytest.approx(energy, rel=1e-6))

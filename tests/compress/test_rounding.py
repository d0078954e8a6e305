"""What a layer reads in calibration is what it will read: divided, rounded, with scales measured on real inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant.compress.rounding import Ranges, Reading, Rounded, Rounding, measured
from hfquant.model.blocks import Weight
from hfquant.tensors.activations import fake_quantize
from hfquant.tensors.encoding import Activations
from hfquant.tensors.layer import Quantized


def ranges(x: Tensor) -> Ranges:
    found = Ranges()
    for part in x.split(7):
        found.add(part)
    return found


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_inputs_behind_an_activation_are_one_sided() -> None:
    x = normal(40, 64)
    assert not ranges(x).one_sided
    for act in (nn.ReLU(), nn.GELU(), nn.SiLU()):
        assert ranges(act(x)).one_sided, act
        assert ranges(-act(x)).one_sided, act


@pytest.mark.parametrize("per", ["token", "tensor", "static"])
def test_asymmetric_by_itself_where_one_sided_and_nowhere_else(per: Any) -> None:
    reading = Reading(Activations(8, per), automatic=True)
    x = normal(40, 64)
    for inputs, symmetric in ((x, True), (x.relu(), False)):
        found, note = measured(reading, None, ranges(inputs), True)
        assert found.activations is not None
        assert found.activations.symmetric is symmetric
        assert note is None
        error = (found(inputs) - inputs).norm() / inputs.norm()
        fixed, _ = measured(Reading(Activations(8, per)), None, ranges(inputs), True)
        assert 0 < error <= (fixed(inputs) - inputs).norm() / inputs.norm()
        barred, _ = measured(reading, None, ranges(inputs), False)
        assert barred.activations is not None
        assert barred.activations.symmetric, "a format that knows no zero points of activations"


def test_a_static_scale_spans_what_was_seen_or_clips_it() -> None:
    x = normal(200, 64)
    x[17] *= 100
    whole, _ = measured(Reading(Activations(8, "static")), None, ranges(x), True)
    clipped, _ = measured(Reading(Activations(8, "static"), clip=99.0), None, ranges(x), True)
    assert whole.static_scale is not None
    assert clipped.static_scale is not None
    torch.testing.assert_close(whole.static_scale, x.abs().max()[None] / 127)
    rest = torch.cat([x[:17], x[18:]])
    torch.testing.assert_close(clipped.static_scale, rest.abs().max()[None] / 127)
    assert (clipped(rest) - rest).norm() < 0.1 * (whole(rest) - rest).norm()


def test_without_inputs_a_static_scale_is_found_at_run_time() -> None:
    found, note = measured(Reading(Activations(8, "static")), None, None, True)
    assert found.activations == Activations(8, "tensor")
    assert note == "no inputs seen: their scale is found at run time"
    assert measured(Reading(Activations(8, "token")), None, None, True)[1] is None


def test_an_input_is_divided_then_rounded() -> None:
    """In the block, whose weight does not know of the factors, the two cancel but for the rounding between."""
    x, s = normal(5, 8) * torch.tensor([100.0, *[1] * 7]), torch.tensor([100.0, *[1] * 7])
    how = Rounded(s, Activations(8, "token"))
    assert torch.equal(how(x), fake_quantize(x / s, Activations(8, "token")) * s)
    naive = Rounded(None, Activations(8, "token"))(x)
    assert (how(x) - x)[:, 1:].norm() < 0.1 * (naive - x)[:, 1:].norm()
    torch.testing.assert_close(Rounded(s)(x), x)


def test_it_is_stored_beside_the_weight() -> None:
    from hfquant.tensors.grid import Grid

    W = normal(4, 8)
    grid = Grid(8, -1)
    scale, zero = grid.fit(W)
    Q = Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)
    how = Rounded(torch.full((8,), 2.0), Activations(8, "static"), torch.tensor([0.1]), torch.tensor([0.0]))
    assert str(how.on(Q).encoding) == "w8sym-a8static-s"
    torch.testing.assert_close(how.on(Q).dequantize(), Q.dequantize() / 2)
    assert how.on(Q).activation_scale is how.static_scale


def test_hooks_are_there_until_the_end() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(input=x)
            return y

    block, x, weight = Block(), normal(3, 8), Weight("a.weight", "a", "linear")
    plain = block(x)
    with Rounding(block) as rounding:
        rounding.put({weight: Rounded(None, Activations(4, "token"))})
        rounding.put({weight: Rounded(None, Activations(2, "token"))})  # the first word counts: only one hook
        torch.testing.assert_close(block(x), block.a(fake_quantize(x, Activations(4, "token"))))
        assert not torch.allclose(block(x), plain)
    assert torch.equal(block(x), plain)

"""The decoded `.weight` of a layer that has none: cheap to ask about, impossible to change."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfquant.errors import HfquantError
from hfquant.runtime import nn as packed
from hfquant.runtime.nn import QLinear
from hfquant.runtime.view import WeightView
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid

from .rounding import random


def layer_of(fmt: str = "compressed_tensors") -> QLinear:
    return QLinear.from_quantized(random(32, 64, Grid(4, 32, True)), None, formats.load(fmt), torch.bfloat16)


@pytest.mark.parametrize("fmt", ["compressed_tensors", "gptq"])
def test_values_are_the_decoded_weight(fmt: str) -> None:
    layer = layer_of(fmt)
    W = layer.dequantize(torch.bfloat16)
    assert isinstance(layer.weight, WeightView)
    assert torch.equal(layer.weight, W)
    assert torch.equal(layer.weight + 1, W + 1)
    assert torch.equal(layer.weight.T, W.T)
    assert torch.equal(layer.weight[3:5].float(), W[3:5].float())
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([W, W]))
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, W))
    assert type(layer.weight.clone()) is Tensor


def test_metadata_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 asks for `wo.weight.dtype` three times in every forward."""
    layer = layer_of()
    monkeypatch.delattr(packed.torch.ops.hfquant, "weight")
    weight = layer.weight
    assert weight.dtype == torch.bfloat16
    assert weight.shape == (32, 64) == (weight.size(0), weight.size(1))
    assert (weight.device.type, weight.ndim, weight.numel(), len(weight)) == ("cpu", 2, 32 * 64, 32)
    assert not weight.requires_grad
    assert weight.is_floating_point()
    assert weight._is_hf_initialized
    assert "packed" in repr(weight)
    assert isinstance(weight, Tensor)


def _iadd(weight: Tensor) -> None:
    weight += 1


def _set_data(weight: Tensor) -> None:
    weight.data = torch.zeros(32, 64)


def _set_item(weight: Tensor) -> None:
    weight[0] = 0


def _add_to_data(weight: Tensor) -> None:
    weight.data += torch.ones(32, 64)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(32, 64)),
    "zero_": lambda w: w.zero_(),
    "data.add_": lambda w: w.data.add_(1),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "out=": lambda w: torch.add(torch.ones(32, 64), 1, out=w),
    "nn.init": lambda w: nn.init.normal_(w),
    "+=": _iadd,
    "data +=": _add_to_data,
    "data =": _set_data,
    "[0] =": _set_item,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_refused(change: str) -> None:
    layer = layer_of()
    before = layer.dequantize(torch.float32)
    with pytest.raises(HfquantError, match=r"call `model.dequantize\(\)` first"):
        CHANGES[change](layer.weight)
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_it_cannot_be_replaced() -> None:
    layer = layer_of()
    for new in (torch.zeros(32, 64), nn.Parameter(torch.zeros(32, 64)), layer.weight + 1):
        with pytest.raises(HfquantError, match="cannot be replaced"):
            layer.weight = new
    assert "weight" not in layer.state_dict()


def test_native_stores_bytes_that_no_model_casts_to() -> None:
    """T5 casts activations to `wo.weight.dtype` unless that is int8."""
    layer = layer_of("native")
    assert layer.weight.dtype == torch.int8
    assert layer.weight.ndim == 3

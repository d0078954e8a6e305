"""oneDNN's product is the reference bit for bit, where its instructions are."""

import pytest
import torch

from hfquant.runtime import kernels
from hfquant.runtime.kernels import onednn
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from tests.encoded import encode


def layer_of(text: str) -> QLinear:
    Q = encode(torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * 0.1, Encoding.parse(text))
    return QLinear.from_quantized(Q, torch.linspace(-1, 1, 48), formats.load("native"), torch.float32)


@pytest.mark.parametrize("kind", ["token", "tensor", "static"])
def test_it_is_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 7 bits, so that sums of pairs fit into 16 bits on a processor without VNNI as well
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    layer, x = layer_of(f"w7sym-2of4-r4-a8{kind}-s"), torch.randn(9, 192, generator=torch.Generator().manual_seed(1))
    found = {}
    for mode in ("onednn", "reference"):
        with kernels.mode(mode):
            assert kernels.choose(x, layer.matrix).kernel.name == mode
            found[mode] = layer(x)
    assert torch.equal(found["onednn"], found["reference"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("w8sym", "inputs are not rounded"),
        ("w8-a8token", "for symmetric integers"),
        ("w8sym-a8tokenasym", "for symmetric integers"),
        ("w16sym-a8token", "for symmetric integers"),
        ("w8g64sym-a8token", "for one scale in each row and token"),
        ("w8sym-a8g64", "for one scale in each row and token"),
        ("w8sym-a8token", "this processor has no VNNI"),
    ],
)
def test_reasons(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert onednn.KERNEL.refuses(torch.randn(1, 192), layer_of(text).matrix) == reason

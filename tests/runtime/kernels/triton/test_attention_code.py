"""What the compiler makes of attention over a compressed cache, for GPUs that are not here: see `test_machine_code`."""

import pytest
import torch
from torch import Tensor

from hfquant.runtime.kv_cache import CompressedLayer

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from hfquant.runtime.kernels.triton.attention import TOKENS, attend

from .machine_code import SHARED, Launch, compiled, recorded

WARPS = 4
# instructions of the loop per code of a key or value, by bits and channels (8 bit: with a mask).  A Hopper's memory at
# 4.3 TB/s leaves time for 3.5 to 3.9 at 4 bit: instructions are the limit there
MOST = {(8, 64): 9.5, (4, 64): 9.0, (2, 64): 11.7, (4, 128): 7.3}


def launches(monkeypatch: pytest.MonkeyPatch, bits: int, size: int, masked: bool) -> list[Launch]:
    """Shares of the packed tokens, and what puts them together."""
    layer = CompressedLayer(bits, 20, 64)
    layer.update(*(torch.zeros(1, 2, 1000, size, dtype=torch.bfloat16) for _ in range(2)))
    mask = torch.ones(1, 1000, dtype=torch.bool) if masked else None
    query, recent = torch.zeros(1, 8, size, dtype=torch.bfloat16), (layer.keys, layer.values)

    def call() -> Tensor:
        return attend(query, layer.tokens, recent, 0.125, mask, split=4)

    return recorded(monkeypatch, call)


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(("bits", "size", "masked"), [(8, 64, True), (4, 64, False), (2, 64, False), (4, 128, False)])
def test_attention(bits: int, size: int, masked: bool, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spilled registers, tensor cores, and codes made into floats without a conversion."""
    packed, merge = (compiled(launch, arch) for launch in launches(monkeypatch, bits, size, masked))
    for code in (packed, merge):
        assert code.spilled == 0
        assert code.shared <= SHARED[arch]
        assert code.loop["HMMA"] + code.loop["HGMMA"]
    assert not packed.loop["I2F"] + packed.loop["I2FP"]
    per_code = packed.loop[""] * 32 * WARPS / (TOKENS * 2 * size)
    assert per_code <= MOST[bits, size]

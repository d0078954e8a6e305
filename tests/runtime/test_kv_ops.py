"""The operators of a compressed cache as torch sees them: schemas, fake tensors, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfquant.errors import ShapeError
from hfquant.runtime import kv_ops, kv_packed
from hfquant.runtime.kv_cache import CompressedLayer

OPS = torch.ops.hfquant


def layer(bits: int, queries: int | None, dtype: torch.dtype) -> CompressedLayer:
    generator = torch.Generator().manual_seed(0)
    made = CompressedLayer(bits, 20, 16, queries=queries)
    made.update(*(torch.randn(2, 3, 90, size, generator=generator).to(dtype) for size in (64, 48)))
    return made


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize(("bits", "queries"), [(8, None), (8, 8), (4, None), (2, 8)])
def test_attention_is_an_operator(
    bits: int, queries: int | None, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFQUANT_KERNELS", kernels)
    for dtype in (torch.float32, torch.bfloat16):
        made, query = layer(bits, queries, dtype), torch.randn(2, 6, 64).to(dtype)
        mask, recent = torch.ones(2, 90, dtype=torch.bool), (made.keys, made.values)
        mask[0, :40] = False
        parts = [getattr(made, name) for name in made.packed]
        for seen in (None, mask):
            how = parts, recent, seen, 0.125, bits, 16, made.channels, (64, 48), queries
            torch.library.opcheck(OPS.kv_attend, (query, *how))
            found = kv_ops.attend(query, made.tokens, recent, 0.125, seen)
            assert torch.equal(found, kv_packed.attend(query, made.tokens, recent, 0.125, seen))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_is_an_operator(bits: int) -> None:
    keys, values = torch.randn(2, 3, 32, 20), torch.randn(2, 3, 32, 24).bfloat16()
    torch.library.opcheck(OPS.kv_pack, (keys, values, bits, 16, 12))


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are packed and looked at without a break, with another number of them too."""
    monkeypatch.setenv("HFQUANT_KERNELS", "auto")

    def step(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        packed = OPS.kv_pack(keys[:, :, :64], values[:, :, :64], 8, 32, 48)
        recent = keys[:, :, 64:], values[:, :, 64:]
        return OPS.kv_attend(query * 2, packed, recent, None, 0.125, 8, 32, 48, (64, 48), 8) + 1

    compiled = whole(step)
    for tokens in (70, 91):
        given = torch.randn(1, 6, 64), torch.randn(1, 2, tokens, 64), torch.randn(1, 2, tokens, 48)
        torch.testing.assert_close(compiled(*given), step(*given))


def test_what_does_not_fit() -> None:
    made, query = layer(8, None, torch.float32), torch.randn(2, 6, 64)
    recent = made.keys, made.values
    bad: list[tuple[Any, ...]] = [
        (query[:1], recent, None),
        (query[:, :5], recent, None),
        (query[..., :32], recent, None),
        (query, (made.keys, made.values[:, :, :-1]), None),
        (query, (made.keys[:, :, :0], made.values[:, :, :0]), None),
        (query, (made.keys[:, :2], made.values[:, :2]), None),
        (query, recent, torch.ones(2, 89, dtype=torch.bool)),
        (query, recent, torch.ones(2, 90)),
    ]
    for q, new, mask in bad:
        with pytest.raises(ShapeError, match=r"attention over a compressed cache was given (.|\n)*hint: give it"):
            kv_ops.attend(q, made.tokens, new, 0.125, mask)
    with pytest.raises(RuntimeError, match=r"queries \[2, 6, 32\] for keys"), torch.device("meta"):
        kv_ops._fake_attend(torch.empty(2, 6, 32), [], (made.keys, made.values))

"""The operators as torch sees them: schemas, fake tensors, gradients, compilation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from hfquant.runtime import kernels
from hfquant.runtime.kernels import int4pack
from hfquant.runtime.nn import QEmbedding, QLinear
from hfquant.runtime.reference import dense
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.grid import Grid

from .rounding import random, rounded

GRIDS = {"native": Grid(5, 48, False), "compressed_tensors": Grid(4, 32, True), "gptq": Grid(3, 32, False)}


def arguments(fmt: str, shape: tuple[int, int] = (32, 96), experts: int = 0) -> tuple[Any, ...]:
    """Components and description of a weight, as the operators take them."""
    grid = GRIDS[fmt]
    packed = [formats.load(fmt).pack(random(*shape, grid, seed)) for seed in range(max(experts, 1))]
    parts = [torch.stack([p[c] for p in packed]) if experts else packed[0][c] for c in packed[0]]
    return parts, fmt, str(Encoding(grid)), *shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", formats.NAMES)
def test_opcheck_linear(fmt: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 96, dtype=dtype, requires_grad=True)
    bias = torch.randn(32, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.hfquant.linear, (x, bias, *arguments(fmt)))
    torch.library.opcheck(torch.ops.hfquant.linear, (x.detach(), None, *arguments(fmt)))


def test_opcheck_the_others() -> None:
    weight = arguments("native")
    torch.library.opcheck(torch.ops.hfquant.weight, (*weight, torch.bfloat16))
    ids = torch.tensor([[3, 31], [0, 3]])
    torch.library.opcheck(torch.ops.hfquant.embedding, (ids, *weight, torch.bfloat16))


@pytest.mark.parametrize("fmt", ["native", "compressed_tensors"])
def test_opcheck_experts(fmt: str) -> None:
    x, expert = torch.randn(6, 96, requires_grad=True), torch.tensor([2, 0, 0, 4, 2, 1])  # 4: there is none
    torch.library.opcheck(torch.ops.hfquant.experts, (x, expert, *arguments(fmt, experts=4)))
    grad = torch.randn(6, 32)
    torch.library.opcheck(torch.ops.hfquant.experts_grad, (grad, expert, *arguments(fmt, experts=4)))


@pytest.mark.parametrize("fmt", formats.NAMES)
def test_gradients_are_the_dense_layers(fmt: str) -> None:
    layer = QLinear.from_quantized(random(32, 96, GRIDS[fmt]), torch.zeros(32), formats.load(fmt), torch.float32)
    layer.bias.requires_grad_()
    x, seen = torch.randn(2, 3, 96, requires_grad=True), torch.randn(2, 3, 32)
    found = torch.autograd.grad(layer(x), (x, layer.bias), seen)
    W, bias = layer.dequantize(torch.float32), torch.zeros(32, requires_grad=True)
    expected = torch.autograd.grad(F.linear(x, W, bias), (x, bias), seen)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_experts_gradients_are_the_dense_ones() -> None:
    x, expert = torch.randn(6, 96, requires_grad=True), torch.tensor([2, 0, 0, 4, 2, 1])
    weight = arguments("native", experts=4)
    seen = torch.randn(6, 32)
    (found,) = torch.autograd.grad(torch.ops.hfquant.experts(x, expert, *weight), x, seen)
    W = torch.stack([random(32, 96, GRIDS["native"], seed).dequantize() for seed in range(4)])
    W = torch.cat([W, torch.zeros(1, 32, 96)])  # the expert that does not exist
    (expected,) = torch.autograd.grad(torch.einsum("ti,toi->to", x, W[expert]), x, seen)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("group_size", [32, 48, 128, -1])
def test_decoding_in_chunks_is_exact(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Q = random(50, 576, Grid(3, group_size, False))
    for chunk in (1, 10_000, 1 << 20):
        monkeypatch.setattr("hfquant.runtime.reference.CHUNK", chunk)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(dense(Q, dtype), Q.dequantize().to(dtype))


def llama_block() -> tuple[nn.Module, dict[str, Tensor]]:
    """A decoder block whose linear layers are packed, one format and width after another, and its inputs."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    block = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0).eval().bfloat16()
    linears = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    for i, (name, linear) in enumerate(linears):
        fmt, grid = [
            ("native", Grid(5, 48, False)),
            ("compressed_tensors", Grid(4, 32, True)),
            ("gptq", Grid(3, 32, False)),
        ][i % 3]
        block.set_submodule(
            name, QLinear.from_quantized(rounded(linear.weight, grid), None, formats.load(fmt), torch.bfloat16)
        )
    rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    x = torch.randn(1, 4, 64).bfloat16()
    return block, {"hidden_states": x, "position_embeddings": rope(x, torch.arange(4)[None])}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compressed_block_compiles_whole(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break; the same numbers; and the packs of eager code are found, not made again."""
    block, inputs = llama_block()
    made = []
    prepare = int4pack.prepare
    monkeypatch.setattr(int4pack, "prepare", lambda Q: made.append(1) or prepare(Q))
    torch.compiler.reset()
    with torch.no_grad(), kernels.mode("int4pack"):
        expected = block(**inputs)
        eager = len(made)
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs), expected, atol=2e-2, rtol=2e-2)
        assert len(made) == eager
        # a weight changed after compilation is noticed inside the graph
        for linear in block.modules():
            if isinstance(linear, QLinear):
                scale = linear.parts[1] if linear.fmt.name != "gptq" else linear.scales
                scale.mul_(0.5)
        assert not torch.allclose(compiled(**inputs), expected, atol=2e-2)
        torch.testing.assert_close(compiled(**inputs), block(**inputs), atol=2e-2, rtol=2e-2)


def test_training_through_a_compiled_layer() -> None:
    layer = QLinear.from_quantized(random(32, 96, GRIDS["native"]), None, formats.load("native"), torch.float32)
    x = torch.randn(3, 96, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_an_embedding_compiles_whole() -> None:
    table = QEmbedding.from_quantized(random(50, 96, GRIDS["native"]), formats.load("native"), torch.float32)
    torch.compiler.reset()
    ids = torch.tensor([[1, 49]])
    assert torch.equal(torch.compile(table, fullgraph=True, backend="aot_eager")(ids), table(ids))

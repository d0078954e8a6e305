"""Packed experts compute what the dense experts class computes with the decoded weights."""

import copy

import pytest
import torch
import transformers
from torch import nn

from hfquant.errors import FormatError
from hfquant.runtime import cache
from hfquant.runtime.experts import QExperts, is_experts, refuses, swap_experts
from hfquant.runtime.swap import dequantize_, swap
from hfquant.tensors import formats
from hfquant.tensors.activations import fake_quantize
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.formats import Wire
from hfquant.tensors.grid import Grid
from tests.encoded import encode

from .rounding import fill

COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(intermediate_size=96, num_local_experts=4, **COMMON),
    "qwen3_moe": transformers.Qwen3MoeConfig(moe_intermediate_size=32, num_experts=4, head_dim=16, **COMMON),
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family], experts_implementation="eager").eval()


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    return next((name, module) for name, module in model.named_modules() if is_experts(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fmt", "grid"),
    [
        ("native", Grid(4, 32, True)),
        ("native", Grid(3, 48, False)),
        ("native", Grid(8, -1, False)),
        ("compressed_tensors", Grid(4, 32, True)),
    ],
)
@pytest.mark.parametrize("family", CONFIGS)
def test_forward_is_the_dense_class(family: str, fmt: str, grid: Grid, dtype: torch.dtype) -> None:
    _, source = experts_of(model_of(family))
    experts, dense = copy.deepcopy(source).to(dtype), copy.deepcopy(source).to(dtype)
    swap_experts(experts, Encoding(grid), formats.load(fmt), torch.float16)
    fill(experts, source)
    for param in experts.packed:
        getattr(dense, param).data = experts.dequantize(param, dtype)
    for tokens in (1, 9):
        x = torch.randn(tokens, 64).to(dtype)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).to(dtype)
        y, expected = experts(x, index, weights), dense(x, index, weights)
        assert y.dtype == dtype
        assert (y - expected).norm() <= (1e-6 if dtype == torch.float32 else 2**-6) * expected.norm()
        assert y.norm() > 0


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sentinel_contributes_nothing(has_bias: bool) -> None:
    _, experts = experts_of(model_of("mixtral"))
    source = copy.deepcopy(experts)
    swap_experts(experts, Encoding(Grid(4, 32, True)), formats.load("native"), torch.float16)
    fill(experts, source)
    experts.has_bias = has_bias
    experts.gate_up_proj_bias, experts.down_proj_bias = (nn.Parameter(torch.randn(4, n)) for n in (192, 64))
    x, weights = torch.randn(1, 64), torch.tensor([[0.5, 0.5]])
    alone = experts(x, torch.tensor([[1, 4]]), weights)
    torch.testing.assert_close(alone, experts(x, torch.tensor([[1]]), weights[:, :1]))


def test_biases_are_added() -> None:
    _, experts = experts_of(model_of("mixtral"))
    source = copy.deepcopy(experts)
    swap_experts(experts, Encoding(Grid(8, 32, True)), formats.load("native"), torch.float16)
    fill(experts, source)
    experts.has_bias = True
    first, second = torch.randn(4, 192), torch.randn(4, 64)
    experts.gate_up_proj_bias, experts.down_proj_bias = nn.Parameter(first), nn.Parameter(second)
    x = torch.randn(1, 64)
    gate, up = (x @ experts.dequantize("gate_up_proj", torch.float32)[2].T + first[2]).chunk(2, -1)
    expected = (experts.act_fn(gate) * up) @ experts.dequantize("down_proj", torch.float32)[2].T + second[2]
    torch.testing.assert_close(experts(x, torch.tensor([[2]]), torch.ones(1, 1)), expected)


@pytest.mark.parametrize(
    ("fmt", "suffixes"), [("native", ("", "_scale")), ("compressed_tensors", ("_packed", "_scale", "_shape"))]
)
def test_parameter_names(fmt: str, suffixes: tuple[str, ...]) -> None:
    with torch.device("meta"):
        _, experts = experts_of(model_of("mixtral"))
    swap_experts(experts, Encoding(Grid(4, 32, True)), formats.load(fmt), torch.float16)
    names = {param + suffix for param in ("gate_up_proj", "down_proj") for suffix in suffixes}
    assert set(experts._parameters) == names
    assert all(p.is_meta and p._is_hf_initialized for p in experts.parameters())
    assert experts.gate_up_proj_scale.shape == (4, 192, 2)
    assert type(experts).__name__ == "QMixtralExperts"
    assert isinstance(experts, QExperts)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_model_swaps_compiles_and_comes_back(family: str) -> None:
    model, source = model_of(family), model_of(family)
    name, _ = experts_of(model)
    assert swap(model, Wire(format="native", layers={name: Grid(8, 32, False)})) == [name]
    fill(model, source)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before, packed = source(ids).logits, model(ids).logits
        assert 0 < (packed - before).norm() < 0.02 * before.norm()
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, packed)
        held = cache.size()
        dequantize_(model, torch.float32)
        assert cache.size() <= held
        torch.testing.assert_close(model(ids).logits, packed)
    assert type(experts_of(model)[1]) is type(experts_of(source)[1])
    assert model.state_dict().keys() == source.state_dict().keys()


def test_a_cached_pack_follows_its_expert() -> None:
    """Packs are kept per expert; changing one expert's scale drops them all."""
    _, experts = experts_of(model_of("mixtral"))
    source = copy.deepcopy(experts)
    swap_experts(experts.bfloat16(), Encoding(Grid(4, 32, True)), formats.load("native"), torch.float16)
    fill(experts, source)
    x, weights = torch.randn(1, 64).bfloat16(), torch.ones(1, 1).bfloat16()
    first, second = (experts(x, torch.tensor([[e]]), weights) for e in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(experts(x, torch.tensor([[0]]), weights), first)
    with torch.no_grad():
        experts.down_proj_scale[1].mul_(2)
    torch.testing.assert_close(experts(x, torch.tensor([[1]]), weights), 2 * second)


def test_what_cannot_be_packed_says_why() -> None:
    _, experts = experts_of(model_of("mixtral"))
    with pytest.raises(FormatError, match="`gptq` cannot store gate_up_proj"):
        swap_experts(experts, Encoding(Grid(4, 32, True)), formats.load("gptq"), torch.float16)
    assert refuses(experts) is None
    experts.is_transposed = True
    with pytest.raises(
        FormatError, match="the experts of MixtralExperts cannot be compressed: its matrices are stored transposed"
    ):
        swap_experts(experts, Encoding(Grid(4, 32, True)), formats.load("native"), torch.float16)


@pytest.mark.parametrize("text", ["w4g32sym-2of4", "w16sym-2of4", "w8sym-a8token", "w4g32-2of4-a8tokenasym"])
@pytest.mark.parametrize("family", CONFIGS)
def test_sparse_experts_with_rounded_inputs(family: str, text: str) -> None:
    """Every projection reads what it is given rounded."""
    encoding = Encoding.parse(text)
    _, source = experts_of(model_of(family))
    experts = copy.deepcopy(source)
    swap_experts(experts, encoding, formats.load("native"), torch.float16)
    for param in experts.packed:
        experts.fill(param, [encode(W, encoding) for W in getattr(source, param).detach()])
    x = torch.randn(9, 64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)

    def read(x: torch.Tensor) -> torch.Tensor:
        return x if encoding.activations is None else fake_quantize(x, encoding.activations)

    expected = torch.zeros(9, 64)
    first, second = (experts.dequantize(param, torch.float32) for param in ("gate_up_proj", "down_proj"))
    for token, row in enumerate(index.tolist()):
        for k, e in enumerate(row):
            gate, up = (read(x[token, None]) @ first[e].T).chunk(2, -1)
            inner = experts.act_fn(gate) * up
            expected[token] += weights[token, k] * (read(inner) @ second[e].T)[0]
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-4, atol=1e-6)


def test_what_experts_cannot_have_is_refused_before_work() -> None:
    _, experts = experts_of(model_of("mixtral"))
    for text in ("w4g32sym-r4", "w4g32sym-kept100", "w4g32sym-s", "w8sym-a8static"):
        with pytest.raises(FormatError, match="`native` cannot store gate_up_proj"):
            swap_experts(experts, Encoding.parse(text), formats.load("native"), torch.float16)
    assert not isinstance(experts, QExperts)

"""A head in fewer bits at run time: what it computes, and that it is no part of the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

pytest.importorskip("llvmlite")

import hfquant
from hfquant.errors import RecipeError
from hfquant.llvm import machine
from hfquant.runtime import cache, kernels
from hfquant.runtime.head import rounded
from hfquant.tensors.grid import Grid

pytestmark = [
    pytest.mark.skipif(machine.level() is None, reason="needs AVX2"), pytest.mark.usefixtures("fastest"),
]  # fmt: skip


def model(tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=211, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_it_multiplies_by_the_rounded_weight(bits: int, dtype: torch.dtype) -> None:
    one = model(dtype=dtype)
    assert hfquant.use_head(one, bits) is None
    head, W = one.lm_head, rounded(one.lm_head.weight, Grid(bits, 64, True)).dequantize()
    for rows in (1, 1, 7, 64):
        x = torch.randn(1, rows, 96).to(dtype)
        with kernels.mode("exact"):
            y = head(x)
        exact = F.linear(x.double(), W.double())
        assert (y - exact).norm() < (4e-3 if dtype == torch.bfloat16 else 1e-5) * exact.norm()
        assert not torch.equal(y, F.linear(x, head.weight))
        assert 0 < (head(x) - exact).norm() < 1.2e-2 * exact.norm()  # with x in 8 bit too
        assert y.dtype == dtype


@torch.no_grad()
def test_the_parameter_is_what_it_was() -> None:
    one = model()
    state, before = copy.deepcopy(one.state_dict()), cache.size()
    ids = torch.arange(5)[None]
    dense = one(ids).logits
    hfquant.use_head(one, 8)
    close = one(ids).logits
    assert 0 < (close - dense).norm() < 0.02 * dense.norm()
    assert cache.size() > before
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert one.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(copy.deepcopy(one)(ids).logits, close)
    one.lm_head.weight.mul_(2)  # the embedding, too
    fresh = model()
    fresh.load_state_dict(one.state_dict())
    hfquant.use_head(fresh, 8)
    assert torch.equal(one(ids).logits, fresh(ids).logits)
    hfquant.use_head(one, None)
    assert type(one.lm_head) is nn.Linear
    hfquant.use_head(fresh, None)
    assert torch.equal(one(ids).logits, fresh(ids).logits)


def test_where_it_stays_dense() -> None:
    """More rows than a decoder's, gradients, graphs, autocast, other kernels."""
    one = model()
    hfquant.use_head(one, 8)
    head = one.lm_head
    x = torch.randn(1, 1, 96).bfloat16()
    dense = F.linear(x, head.weight)
    assert torch.equal(head(x), dense)  # the weight may learn
    with torch.no_grad():
        assert not torch.equal(head(x), dense)
        many = torch.randn(65, 96).bfloat16()
        assert torch.equal(head(many), F.linear(many, head.weight))
        assert torch.equal(torch.compile(head, fullgraph=True, backend="aot_eager")(x), dense)
        with kernels.mode("reference"):
            assert torch.equal(head(x), dense)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(x), dense)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(tied=False)
    with pytest.raises(RecipeError, match="a head of 3 bits is not offered"):
        hfquant.use_head(one, 3)
    monkeypatch.setattr(machine, "level", lambda: None)
    assert hfquant.use_head(one, 8) == "this processor has no AVX2"
    one.lm_head = nn.Sequential(one.lm_head)
    assert hfquant.use_head(one, 8) == "it is no dense linear layer (Sequential)"
    assert hfquant.use_head(one, None) is None

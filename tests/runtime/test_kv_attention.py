"""A compressed cache that a model uses unasked, and attention that reads it packed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

from hfquant import llvm, use_kv_cache
from hfquant.errors import RecipeError
from hfquant.runtime import kv_attention, kv_packed
from hfquant.runtime.kernels import _EXPLAINED
from hfquant.runtime.kv_cache import CompressedCache, CompressedLayer
from hfquant.runtime.kv_packed import attend
from hfquant.tensors.encoding import KVCache
from tests.families import held_out

SMALL = KVCache(8, window=4, group_size=4)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def prompt() -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What HFQUANT_EXPLAIN=1 said since it was last asked."""
    monkeypatch.setenv("HFQUANT_EXPLAIN", "1")
    _EXPLAINED.clear()
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("size", "group"), [(64, 64), (96, 32), (20, 16), (128, 16)])
def test_packed_attention_is_that_of_decoded_tokens(
    bits: int, size: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in many, with hidden tokens, several queries of a head."""
    generator = torch.Generator().manual_seed(0)
    layer = CompressedLayer(bits, 20, group)
    keys, values = (torch.randn(2, 3, 200, size, generator=generator) for _ in range(2))
    layer.update(keys, values)
    query, mask = torch.randn(2, 6, size, generator=generator), torch.ones(2, 200, dtype=torch.bool)
    mask[1, :70] = False
    K = torch.cat([layer.tokens.keys(torch.float32), layer.keys], 2).double()
    V = torch.cat([layer.tokens.values(torch.float32), layer.values], 2).double()
    scores = query.double().view(2, 3, 2, size) @ K.mT / math.sqrt(size)
    want = (scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1) @ V).flatten(1, 2)
    for room in (1 << 20, 1):
        monkeypatch.setattr(kv_packed, "ROOM", room)
        y = attend(query, layer.tokens, (layer.keys, layer.values), 1 / math.sqrt(size), mask)
        assert relative(y.double(), want) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_generation_reads_packed_tokens(
    family: str, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would decoded ones: the same tokens are found, by way of `attend`."""
    model = AutoModelForCausalLM.from_pretrained(built(family)).eval()
    ids, mask = prompt()
    cache = CompressedCache(model.config, SMALL.bits, SMALL.window, SMALL.group_size)
    decoded = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    use_kv_cache(model, SMALL)
    calls, usual = [], kv_attention.attend
    monkeypatch.setattr(kv_attention, "attend", lambda *given: calls.append(1) or usual(*given))
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), decoded)
    assert len(calls) == 11 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["bloom", "gemma2"])
def test_attention_of_their_own_decodes(family: str, built: Callable[[str], Path]) -> None:
    """BLOOM adds biases to its scores; half of Gemma 2's layers have a window, and stay as they are."""
    model = AutoModelForCausalLM.from_pretrained(built(family)).eval()
    ids, mask = prompt()
    cache = CompressedCache(model.config, 8, 4, 4)
    want = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    use_kv_cache(model, SMALL)
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, want)
    assert any(isinstance(layer, CompressedLayer) and layer.past for layer in out.past_key_values.layers)


def test_beams_and_encoder_decoders(built: Callable[[str], Path]) -> None:
    ids, mask = prompt()
    model = AutoModelForCausalLM.from_pretrained(built("llama")).eval()
    exact = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    use_kv_cache(model, SMALL)
    assert (model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY) == exact).float().mean() > 0.8
    model = AutoModelForSeq2SeqLM.from_pretrained(built("bart")).eval()
    exact = model.generate(ids, attention_mask=mask, **GREEDY)
    use_kv_cache(model, SMALL)
    found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert (found.sequences == exact).float().mean() > 0.8
    assert isinstance(found.past_key_values.self_attention_cache.layers[0], CompressedLayer)
    assert not isinstance(found.past_key_values.cross_attention_cache.layers[0], CompressedLayer)


@pytest.mark.parametrize("queries", [None, 8])
def test_generated_code_and_torch_find_the_same_tokens(
    queries: int | None, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole model, 32 channels a head: which of the two attends is known.

    Their sums differ in the last places of float32, and a key that differs there may be kept as the next code.
    """
    pytest.importorskip("llvmlite")
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    use_kv_cache(model, KVCache(8, window=4, group_size=16, queries=queries))
    ids, mask = prompt()
    monkeypatch.setenv("HFQUANT_KERNELS", "auto")
    generates, found, ran = llvm.refused() is None, [], []
    usual = kv_packed.attend_reference
    monkeypatch.setattr(kv_packed, "attend_reference", lambda *given: ran.append(1) or usual(*given))
    for kernels in ("auto", "reference"):
        monkeypatch.setenv("HFQUANT_KERNELS", kernels)
        out = model.generate(
            ids,
            attention_mask=mask,
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY | {"max_new_tokens": 24},
        )
        found.append((out.sequences, torch.stack(out.logits), len(ran)))
    (tokens, logits, generated), (expected, reference, plain) = found
    assert (generated, plain) == ((0, 2 * 23) if generates else (2 * 23, 4 * 23))
    assert torch.equal(tokens, expected)
    assert relative(logits, reference) < 1e-4


def test_queries_are_rounded_in_every_layer(trained: Callable[[str], Path], explained: Callable[[], str]) -> None:
    """It costs something and little; without it, nothing changes."""
    model, ids = AutoModelForCausalLM.from_pretrained(trained("llama")).eval(), held_out(16)
    exact = perplexity(model, ids, 32)
    cost = {}
    for queries in (None, 8):
        use_kv_cache(model, KVCache(8, window=0, group_size=16, queries=queries))
        cost[queries] = perplexity(model, ids, 32) / exact - 1
    assert cost[8] != cost[None]
    assert abs(cost[8]) < 0.002
    assert "keys and values of 8 bit, queries in 8, 16 channels" in explained()


def perplexity(model: PreTrainedModel, ids: Tensor, start: int) -> float:
    """Of the tokens behind `start`, given one by one."""
    with torch.no_grad():
        cache, total = DynamicCache(config=model.config), torch.zeros(())
        model(ids[:, :start], past_key_values=cache)
        for at in range(start, ids.shape[1] - 1):
            logits = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
            total += torch.nn.functional.cross_entropy(logits, ids[:, at + 1])
    return float((total / (ids.shape[1] - 1 - start)).exp())


def test_what_it_costs(trained: Callable[[str], Path]) -> None:
    """8 bit next to nothing, 4 bit little, 2 bit more; and off is off again."""
    model, ids = AutoModelForCausalLM.from_pretrained(trained("llama")).eval(), held_out(16)
    exact = perplexity(model, ids, 32)
    cost = {}
    for bits in (8, 4, 2):
        use_kv_cache(model, KVCache(bits, window=0, group_size=16))
        cost[bits] = perplexity(model, ids, 32) / exact - 1
    assert abs(cost[8]) < 0.001
    assert cost[8] < cost[4] < 0.02
    assert cost[4] < cost[2]
    use_kv_cache(model, None)
    assert perplexity(model, ids, 32) == exact
    assert model.config._attn_implementation == "sdpa"


def test_off_before_it_was_ever_on(built: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(built("llama")).eval()
    ids, mask = prompt()
    for how, kind in ((None, DynamicLayer), (SMALL, CompressedLayer), (None, DynamicLayer), (SMALL, CompressedLayer)):
        use_kv_cache(model, how)
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
        assert {type(layer) for layer in out.past_key_values.layers} == {kind}


def test_explain_says_what_runs_and_why(built: Callable[[str], Path], explained: Callable[[], str]) -> None:
    ids, mask = prompt()
    model = AutoModelForCausalLM.from_pretrained(built("llama")).eval()
    use_kv_cache(model, SMALL)
    model.generate(ids, attention_mask=mask, **GREEDY)
    assert "one query over keys and values of 8 bit, 16 channels, groups of 4: torch, a piece at a time" in explained()
    model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **GREEDY)
    assert "this cache is used as it is: it was passed to `generate`" in explained()
    with torch.enable_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert "keys and values of 8 bit are decoded: gradients are wanted" in explained()
    eager = AutoModelForCausalLM.from_pretrained(built("llama"), attn_implementation="eager").eval()
    use_kv_cache(eager, 8)
    assert "LlamaForCausalLM decodes what its cache keeps packed: its attention is `eager`" in explained()


def test_what_does_not_fit_is_refused(built: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(built("llama"))
    with pytest.raises(RecipeError, match=r"a cache of 3 bits does not exist\n\nhint: choose 8"):
        use_kv_cache(model, 3)
    windowed = AutoModelForCausalLM.from_pretrained(built("gemma3"))
    with pytest.raises(RecipeError, match="none of its layers keeps all tokens"):
        use_kv_cache(windowed, 8)
    rounded = KVCache(8, queries=8)
    bloom = AutoModelForCausalLM.from_pretrained(built("bloom"))
    with pytest.raises(RecipeError, match=r"Bloom.* cannot compare queries in 8 bit: .*replaced\n\nhint: .*: `kv8`"):
        use_kv_cache(bloom, rounded)
    capped = AutoModelForCausalLM.from_pretrained(built("gemma2"))
    with pytest.raises(RecipeError, match="its attention has `softcap`"):
        use_kv_cache(capped, rounded)
    eager = AutoModelForCausalLM.from_pretrained(built("llama"), attn_implementation="eager")
    with pytest.raises(RecipeError, match="queries are rounded where attention is `sdpa`, and here it is `eager`"):
        use_kv_cache(eager, rounded)
    with pytest.raises(RecipeError, match="queries of 4 bits do not exist"):
        use_kv_cache(model, KVCache(8, queries=4))
    assert not any(hasattr(each, "hfquant_kv_cache") for each in (bloom, capped, eager, model))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(RecipeError, match="MambaForCausalLM has no use for `kv8`"):
        use_kv_cache(mamba, 8)
    assert not hasattr(mamba, "hfquant_kv_cache")

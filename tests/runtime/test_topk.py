"""Sparse attention: all tokens give the usual result, and the few that matter nearly so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hfquant.errors import RecipeError
from hfquant.runtime.topk import attend, use_topk
from tests.families import FAMILIES


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: int) -> torch.Tensor:
    """One query at a time, the newest token and `kept` others, which take over the weight of the rest."""
    out = torch.zeros(query.shape)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            K, V = key[b, h // group], value[b, h // group]
            weights = (K @ query[b, h, 0] * query.shape[-1] ** -0.5).softmax(0)
            order = sorted(range(len(K) - 1), key=lambda i: -float(weights[i]))[:kept]
            scale = weights[:-1].sum() / weights[order].sum()
            out[b, h, 0] = sum(weights[i] * scale * V[i] for i in order) + weights[-1] * V[-1]
    return out.transpose(1, 2)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_it_is_the_definition(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 21, 8, generator=generator).unbind(0)
    found, _ = attend(nn.Identity(), query, key, value, None, share=share)
    assert torch.allclose(found, textbook(query, key, value, round(share * 20)), atol=1e-6)


def test_constant_values_stay_what_they_are() -> None:
    """No weight is lost with the tokens that are dropped."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 1, 8, generator=generator), torch.randn(2, 2, 41, 8, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.full((2, 2, 41, 8), 3.0, dtype=dtype)
        found, _ = attend(nn.Identity(), query.to(dtype), key.to(dtype), value, None, share=0.1)
        assert torch.allclose(found, torch.full_like(found, 3.0), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "t5"])
def test_all_tokens_are_the_usual_attention(family: str, built: Callable[[str], Path]) -> None:
    model = getattr(transformers, FAMILIES[family].auto).from_pretrained(built(family)).eval()
    ids = torch.randint(4, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    left, right = slice(0, 5), slice(-5, None)
    mask[0, right if FAMILIES[family].encoder_decoder else left] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **settings)
    use_topk(model, 0.999999)
    assert torch.equal(model.generate(ids, **settings), wanted)
    use_topk(model, 0.05)
    few = model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
    use_topk(model, 1)
    all_of = model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
    assert torch.equal(all_of.sequences, wanted)
    assert not torch.equal(few.logits[-1], all_of.logits[-1])


def test_what_makes_no_sense_is_refused(built: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(built("llama"))
    for share in (0.0, 1.5):
        with pytest.raises(RecipeError, match="hint"):
            use_topk(model, share)
    with pytest.raises(RecipeError, match="of its own"):
        use_topk(transformers.AutoModelForCausalLM.from_pretrained(built("bloom")), 0.5)
    query = torch.randn(1, 1, 1, 4)
    with pytest.raises(RecipeError, match="sinks"):
        attend(nn.Identity(), query, query, query, None, share=0.5, s_aux=torch.zeros(1))

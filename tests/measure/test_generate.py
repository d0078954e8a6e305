from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hfquant.measure.generate import greedy, sample
from tests.families import byte_tokenizer

from .models import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
def test_the_continuation_is_that_of_generate(family: str, built: Callable[[str], Path]) -> None:
    causal = family in ("llama", "gpt2")
    auto = AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(built(family))
    prompt = torch.tensor([AutoTokenizer.from_pretrained(built(family))("Once upon")["input_ids"]])
    tokens, times = greedy(model, prompt, 6)
    plain = {"eos_token_id": None, "forced_eos_token_id": None, "forced_bos_token_id": None}
    mask = torch.ones_like(prompt)
    expected = model.generate(
        prompt, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=6, pad_token_id=0, **plain
    )
    assert tokens == expected[0, -6:].tolist()
    assert len(times) == 6
    assert times == sorted(times)


def test_a_sample_ends_where_the_model_ends() -> None:
    model, tokenizer = tiny(), byte_tokenizer()
    ids = torch.tensor([tokenizer("Once")["input_ids"]])
    tokens, _ = greedy(model, ids, 8)
    model.generation_config.eos_token_id = [tokens[3]]
    found = sample(model, tokenizer, "Once", 8)
    assert found.text == tokenizer.decode(tokens[: tokens.index(tokens[3])], skip_special_tokens=True)
    assert found.tokens == 8
    assert found.tokens_per_second is not None
    assert found.tokens_per_second > 0


def test_one_token_has_no_speed() -> None:
    assert sample(tiny(), byte_tokenizer(), "Once", 1).tokens_per_second is None

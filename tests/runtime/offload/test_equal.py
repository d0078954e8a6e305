"""Greedy tokens are transformers' own, whatever is placed where and whatever the schedule."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.policy import Policy
from tests.families import FAMILIES

NEW = 9
DECODERS = ("llama", "llama-tied", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neo", "gpt_neox", "opt", "bloom",
            "mixtral", "qwen3_moe", "phi3")  # fmt: skip
POLICIES = {
    "everything on disk": Policy(batch=2, batches=3, depth=1),
    "row by row": Policy(batch=2, batches=1),
    "one batch": Policy(batch=6, batches=1, depth=0),
    "half the weights": Policy(batch=3, batches=2, weights=120_000),
    "all weights": Policy(batch=2, batches=2, weights=1 << 30),
    "cache on disk": Policy(batch=2, batches=3, cache_on_disk=True),
}


def prompts(left: bool) -> tuple[Tensor, Tensor]:
    """Six of different lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(6, 11, dtype=torch.long), torch.zeros(6, 11, dtype=torch.long)
    for row, length in enumerate((11, 3, 7, 7, 5, 10)):
        place = slice(11 - length, 11) if left else slice(0, length)
        ids[row, place] = torch.randint(4, 260, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


def expected(family: str, folder: Path, **kwargs: object) -> Tensor:
    made = FAMILIES[family]
    model = getattr(transformers, made.auto).from_pretrained(folder)
    ids, mask = prompts(not made.encoder_decoder)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **kwargs)


def offloaded(family: str, folder: Path, policy: Policy, **kwargs: object) -> Tensor:
    ids, mask = prompts(not FAMILIES[family].encoder_decoder)
    with OffloadedModel(folder, policy) as model:
        return model.generate(ids, mask, max_new_tokens=NEW, do_sample=False, **kwargs)


@pytest.mark.parametrize("family", DECODERS)
def test_families(family: str, built: Callable[[str], Path]) -> None:
    policy = POLICIES["everything on disk"]
    assert torch.equal(offloaded(family, built(family), policy), expected(family, built(family)))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "gemma3"])
def test_policies(family: str, name: str, built: Callable[[str], Path]) -> None:
    assert torch.equal(offloaded(family, built(family), POLICIES[name]), expected(family, built(family)))


@pytest.mark.parametrize("name", ["everything on disk", "cache on disk"])
@pytest.mark.parametrize("family", ["t5", "flan-t5", "bart"])
def test_encoder_decoders(family: str, name: str, built: Callable[[str], Path]) -> None:
    assert torch.equal(offloaded(family, built(family), POLICIES[name]), expected(family, built(family)))

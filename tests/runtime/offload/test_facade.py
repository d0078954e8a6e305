"""An offloaded model generates as transformers' object does, for the usual arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

import hfquant
from hfquant.errors import ResourceError
from hfquant.runtime.offload import facade
from hfquant.runtime.offload.policy import Policy
from tests.families import FAMILIES

POLICY = Policy(batch=2, batches=2)
IDS = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 18},
        {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.3, eos_token_id=None)},
        {"max_new_tokens": 6, "min_new_tokens": 4, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
        {"max_new_tokens": 6, "suppress_tokens": [9, 11], "eos_token_id": [17, 40], "pad_token_id": 0},
        {},
    ],
    ids=lambda a: "-".join(a) or "defaults",
)
def test_arguments_mean_what_they_mean_in_transformers(arguments: dict[str, Any], built: Callable[[str], Path]) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(built("llama"))
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "do_sample": False}
    with hfquant.Offloaded(built("llama"), policy=POLICY) as model:
        assert torch.equal(model.generate(**inputs, **arguments), reference.generate(**inputs, **arguments))
        assert model.config.model_type == "llama"
        assert model.device == reference.device
        assert model.dtype == reference.dtype


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_it_plans_for_what_comes(
    family: str, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)
    seen: list[Any] = []
    plan = facade.plan_offload

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(plan(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(facade, "plan_offload", noted)
    reference = getattr(transformers, FAMILIES[family].auto).from_pretrained(built(family))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with hfquant.Offloaded.from_pretrained(built(family)) as model:
        for rows, plans in ((slice(0, 2), 1), (slice(1, 3), 1), (slice(0, 3), 2)):
            ids = IDS[rows]
            wanted = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            assert torch.equal(model.generate(ids, **settings), wanted)
            assert len(seen) == plans
        assert model.policy.block >= 3
        assert model.policy == seen[-1].solved.policy
    assert seen[-1].solved.prediction.seconds > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_ids": None}, "no prompts"),
        ({"max_length": 12}, "leaves no token"),
        ({"num_beams": 2}, "one sequence"),
        ({"return_dict_in_generate": True}, "tokens only"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"streamer": 1}, "streamer"),
        ({"max_new_tokens": 1000}, "positions"),
    ],
)
def test_what_it_does_not_do_is_said(arguments: dict[str, Any], said: str, built: Callable[[str], Path]) -> None:
    with hfquant.Offloaded(built("llama"), policy=POLICY) as model, pytest.raises(ResourceError, match=said):
        model.generate(**{"input_ids": IDS} | arguments)

"""Greedy continuation of a prompt, and how long each token takes: a look at the model beside its scores."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .evaluate import to
from .feed import Feed


@dataclass(frozen=True)
class Sample:
    """A continuation and its speed: tokens per second after the first, batch 1, None if it was too short."""

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float | None


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 32) -> Sample:
    """The most likely continuation of a prompt, token by token, without the tricks of generation configs.

    How the prompt is given to the model: `Feed.prompt`.  The text ends at the model's end token; the speed is
    that of all `new_tokens`.
    """
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    feed = Feed(model.config)
    if ids.shape[1] > 1 and ids[0, -1] == tokenizer.eos_token_id and (feed.hears or not feed.decodes):
        ids = ids[:, :-1]  # what is to be continued has not ended
    found, seconds = greedy(model, ids, new_tokens)
    ends = [i for i, token in enumerate(found) if token in _ends(model, tokenizer)]
    text = tokenizer.decode(found[: ends[0]] if ends else found, skip_special_tokens=True)
    elapsed = seconds[-1] - seconds[0] if len(seconds) > 1 else 0.0
    return Sample(prompt, str(text), len(found), (len(found) - 1) / elapsed if elapsed else None)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[list[int], list[float]]:
    """-> (token ids, the time at which each was known).  prompt int64 [1, n]"""
    made, grows, ids = Feed(model.config).prompt(prompt)
    fixed: dict[str, Any] = dict(to(made, model))
    cache: dict[str, Any] = {}
    tokens: list[int] = []
    times: list[float] = []
    model.eval()
    for _ in range(new_tokens):
        out = model(**fixed, **cache, **{grows: ids}, use_cache=True, return_dict=True)
        tokens.append(int(out.logits[0, -1].argmax()))
        times.append(time.perf_counter())
        last = torch.tensor([[tokens[-1]]], device=ids.device)
        past = out.get("past_key_values")
        ids = last if past is not None else torch.cat([ids, last], 1)
        cache = {"past_key_values": past} if past is not None else {}
        if "encoder_last_hidden_state" in out:
            fixed = {"encoder_outputs": (out.encoder_last_hidden_state,)}
    return tokens, times


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a text."""
    config = getattr(model.generation_config, "eos_token_id", None)
    listed = config if isinstance(config, list) else [config]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}

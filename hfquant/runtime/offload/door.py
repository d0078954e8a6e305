"""`hfquant.offload_generate`: prompts in, texts out, whatever the memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import ResourceError
from ...model.inputs import longest
from .cost import Workload
from .model import OffloadedModel
from .planning import Budget, plan_offload
from .policy import Policy

DEFAULT_NEW = 64


@contextmanager
def opened(
    model: str | Path,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = DEFAULT_NEW,
    policy: Policy | None = None,
    host_memory: int | None = None,
    disk: str | Path | None = None,
    cache_bits: int = 16,
    attention: float = 1.0,
    latency: float | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[OffloadedModel, list[list[int]]]]:
    """A model with the policy for these prompts adopted, and their token ids.

    Raises SourceError, or ResourceError if the budget is too small, before anything is generated.
    """
    if not prompts:
        raise ResourceError("there are no prompts", "give at least one")
    folder = Path(disk) if disk is not None else None
    with OffloadedModel(model, disk=folder, dtype=dtype) as offloaded:
        ids = token_ids(offloaded, prompts)
        work = Workload(len(ids), max(map(len, ids)), max_new_tokens)
        check_length(offloaded, work)
        if policy is None:
            like = Policy(cache_bits=cache_bits, attention=attention)
            plan = plan_offload(offloaded, work, Budget(host_memory, None, folder), like=like, latency=latency)
            policy = plan.solved.policy
        offloaded.adopt(policy)
        yield offloaded, ids


def offload_generate(
    model: str | Path,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = DEFAULT_NEW,
    policy: Policy | None = None,
    host_memory: int | None = None,
    disk: str | Path | None = None,
    cache_bits: int = 16,
    attention: float = 1.0,
    latency: float | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    **generation: Any,
) -> list[str] | list[list[int]]:
    """Generate from a model that need not fit into memory.

    model: a folder or Hub id, dense or compressed by hfquant.  prompts: texts, answered with texts, or token ids,
    answered with token ids.  host_memory: bytes the process may take (by default what is free); the policy is solved
    for it unless one is given.  disk: folder for temporary files.  cache_bits: 8, 4 or 2 compresses the KV cache;
    attention: 0.1 uses the values of a tenth of the tokens; both change results slightly.  latency: seconds that a
    block of prompts may take.  dtype: what is computed in, by default what is stored; float32 is faster on a processor
    without bfloat16, and costs nothing on disk.  generation: `do_sample`, `temperature` and so on, as for transformers'
    `generate`.
    Raises SourceError, ResourceError.
    """
    settings = {
        "max_new_tokens": max_new_tokens, "policy": policy, "host_memory": host_memory, "disk": disk,
        "cache_bits": cache_bits, "attention": attention, "latency": latency, "dtype": dtype,
    }  # fmt: skip
    texts = bool(prompts) and isinstance(prompts[0], str)
    with opened(model, prompts, **settings) as (offloaded, ids):  # type: ignore[arg-type]
        found = dict(offloaded.stream(ids, seed, max_new_tokens=max_new_tokens, **generation))
        if not texts:
            return [found[i] for i in range(len(ids))]
        tokenizer = offloaded.skeleton.source.tokenizer()
        return [decode(tokenizer, found[i]) for i in range(len(ids))]


def token_ids(offloaded: OffloadedModel, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as the model reads them.  Raises ResourceError for one without any token."""
    if isinstance(prompts[0], str):
        tokenizer = offloaded.skeleton.source.tokenizer()
        ids = [list(tokenizer(text)["input_ids"]) for text in prompts]
    else:
        ids = [list(map(int, prompt)) for prompt in prompts]
    empty = next((i for i, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise ResourceError(f"prompt {empty} is empty", "leave it out, or begin it with a token")
    return ids


def check_length(offloaded: OffloadedModel, work: Workload) -> None:
    """Raises ResourceError if the model has no position for the last token."""
    room = longest(offloaded.config)
    if room is not None and not offloaded.config.is_encoder_decoder and work.prompt + work.new > room:
        raise ResourceError(
            f"the longest prompt has {work.prompt} tokens; with {work.new} new ones that is more than the {room} "
            "positions of the model",
            "shorten the prompt, or lower --max-new-tokens",
        )


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

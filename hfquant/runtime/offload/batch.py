"""One batch of prompts through transformers' `generate`; sequences that have ended leave, and free their place."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from ...errors import ResourceError

LEAVE = 0.25  # of a batch's sequences have ended: the others go on without them
# arguments that look at where generating began, or at its prompt: going on would be a new beginning, so all stay
FROM_THE_START = ("begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
                  "exponential_decay_length_penalty", "guidance_scale", "max_time")  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """What is asked of every batch.  ends: tokens that end a sequence."""

    config: GenerationConfig
    ends: tuple[int, ...]
    pad: int
    max_new_tokens: int
    encoder_decoder: bool

    @staticmethod
    def of(model: Any, asked: Mapping[str, Any], base: GenerationConfig | None = None, prompt: int = 0) -> "Generation":
        """The model's own generation config, or `base`, changed by what is asked.

        prompt: tokens of the longest prompt, for `max_length`, which counts them.  Raises ResourceError for what the
        schedule does not do: several sequences per prompt, assistants, anything but a tensor of tokens as output.
        """
        config: GenerationConfig = copy.deepcopy(model.generation_config if base is None else base)
        unknown = config.update(**asked)
        if unknown:
            raise ResourceError(
                f"offloaded generation does not know the argument `{next(iter(unknown))}`",
                "it takes what transformers' GenerationConfig holds",
            )
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            raise ResourceError("offloaded generation has one sequence per prompt", "leave num_beams at 1")
        if config.return_dict_in_generate:
            raise ResourceError("offloaded generation gives tokens only", "leave return_dict_in_generate out")
        if (mode := config.get_generation_mode()) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ResourceError(f"offloaded generation does not do {mode.value}", "it is greedy, or samples")
        encoder_decoder = bool(model.config.is_encoder_decoder)
        if config.max_new_tokens is None:
            config.max_new_tokens = _new_tokens(config.max_length, 1 if encoder_decoder else prompt)
        config.max_length, config.cache_implementation, config.use_cache = None, None, True
        if encoder_decoder:  # whose first decoder pass is one token; transformers would cut the encoder's mask to it
            config.prefill_chunk_size = None
        ends = config.eos_token_id if config.eos_token_id is not None else []
        listed = tuple(ends) if isinstance(ends, Sequence) else (int(ends),)
        pad = config.pad_token_id if config.pad_token_id is not None else (listed[0] if listed else 0)
        config.pad_token_id = pad
        return Generation(config, listed, int(pad), int(config.max_new_tokens), encoder_decoder)

    def start(self, rows: int) -> Tensor:
        """What an encoder-decoder's answers begin with.  int64 [rows, 1]"""
        config = self.config
        first = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        return torch.full((rows, 1), int(first or 0))

    def ended(self, tokens: Tensor) -> Tensor:
        """Which sequences hold an end.  int64 [rows, new] -> bool [rows]"""
        return torch.isin(tokens, torch.tensor(self.ends, dtype=torch.long, device=tokens.device)).any(1)

    @property
    def lets_go(self) -> bool:
        """Whether sequences that have ended can leave the others of their batch."""
        defaults = GenerationConfig()
        counted = (name for name in FROM_THE_START if getattr(self.config, name, None) != getattr(defaults, name, None))
        return bool(self.ends) and next(counted, None) is None

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """Up to the first end, with it."""
        at = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return list(tokens[: at + 1])


def _new_tokens(max_length: int | None, prompt: int) -> int:
    """What a limit on the whole sequence leaves; 20 where there is none, as in transformers."""
    if max_length is None:
        return 20
    if max_length <= prompt:
        raise ResourceError(f"max_length {max_length} leaves no token after a prompt of {prompt}", "raise it")
    return max_length - prompt


class _Leave(StoppingCriteria):  # type: ignore[misc]
    """Stops a whole batch when enough of its sequences have ended, so that they can be taken out."""

    def __init__(self, settings: Generation, start: int) -> None:
        self.settings, self.start = settings, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = self.settings.ended(input_ids[:, self.start :])
        return torch.ones_like(ended) if ended.sum() >= max(1, LEAVE * len(ended)) else ended


class _Count(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing, and tells how many tokens there are more."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tell(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class Batch:
    """Prompts of one batch.  rows: which they are.  ids, mask: int64 [rows, seq]"""

    rows: list[int]
    ids: Tensor
    mask: Tensor

    @staticmethod
    def of(prompts: Mapping[int, Sequence[int]], settings: Generation) -> "Batch":
        """Padded to one length: on the left, so that the last token is the prompt's own; an encoder's on the right."""
        longest = max(map(len, prompts.values()))
        ids = torch.full((len(prompts), longest), settings.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompts.values()):
            place = slice(0, len(tokens)) if settings.encoder_decoder else slice(longest - len(tokens), longest)
            ids[row, place] = torch.tensor(list(tokens), dtype=torch.long)
            mask[row, place] = 1
        return Batch(list(prompts), ids, mask)

    def generate(
        self,
        model: Any,
        cache: Cache,
        settings: Generation,
        keep: Callable[[Tensor], None],
        tell: Callable[[int], None] | None = None,
        chunk: int | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """(row, new tokens) of all sequences, as they end.

        keep: takes all but these places out of the cache.  tell: is told the number of tokens of every step.  chunk:
        tokens of a decoder's prompt that pass the model together, by default as the settings have it.
        """
        count = [_Count(tell)] if tell is not None else []
        if settings.encoder_decoder:
            out = model.generate(
                self.ids.to(model.device),
                attention_mask=self.mask.to(model.device),
                past_key_values=cache,
                generation_config=settings.config,
                stopping_criteria=StoppingCriteriaList(count),
            )
            for row, tokens in zip(self.rows, out.tolist(), strict=True):
                yield row, settings.cut(tokens[1:])
            return
        rows, ids, mask = list(self.rows), self.ids.to(model.device), self.mask.to(model.device)
        left = settings.max_new_tokens
        prompt, chunk = ids.shape[1], chunk or settings.config.prefill_chunk_size
        while rows:
            leave = [_Leave(settings, prompt)] if settings.lets_go and len(rows) > 1 else []
            out = self._some(model, cache, settings, ids, mask, left, [*leave, *count], chunk)
            chunk = None  # what goes on has one token that is not in the cache
            left -= out.shape[1] - ids.shape[1]
            over = (
                settings.ended(out[:, prompt:])
                if left > 0
                else torch.ones(len(rows), dtype=torch.bool, device=out.device)
            )
            for row, tokens, is_over in zip(rows, out[:, prompt:].tolist(), over.tolist(), strict=True):
                if is_over:
                    yield row, settings.cut(tokens)
            stay = (~over).nonzero().flatten()
            rows = [rows[i] for i in stay.tolist()]
            if rows:
                keep(stay)
            grown = mask.new_ones(len(mask), out.shape[1] - mask.shape[1])
            ids, mask = out[stay], torch.cat([mask, grown], 1)[stay]

    @staticmethod
    def _some(
        model: Any,
        cache: Cache,
        settings: Generation,
        ids: Tensor,
        mask: Tensor,
        left: int,
        criteria: Sequence[StoppingCriteria],
        chunk: int | None,
    ) -> Tensor:
        """Go on until enough sequences have ended, or all have their length."""
        config = copy.deepcopy(settings.config)
        config.max_new_tokens, config.prefill_chunk_size = left, chunk
        if config.min_new_tokens is not None:
            config.min_new_tokens = max(0, config.min_new_tokens - (settings.max_new_tokens - left))
        out: Tensor = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        return out

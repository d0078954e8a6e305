"""An offloaded model for code that expects one of transformers': it generates, and is planned for what it is given."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from ...errors import ResourceError
from .batch import Generation
from .cost import Workload
from .door import check_length
from .model import OffloadedModel
from .planning import Budget, plan_offload
from .policy import Policy


class Offloaded:
    """`generate` as transformers has it, for a model that need not fit into memory.

    model: a folder or Hub id, dense or compressed by hfquant.  host_memory: bytes the process may take, by default what
    is free.  policy: by default solved for at the first call, and again when a later one is larger.  disk: folder for
    temporary files.  cache_bits, attention, latency, dtype: see `hfquant.offload_generate`.  A context manager; leaving
    it, or `close`, frees everything.  Raises SourceError for a model that cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        host_memory: int | None = None,
        policy: Policy | None = None,
        disk: str | Path | None = None,
        cache_bits: int = 16,
        attention: float = 1.0,
        latency: float | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> None:
        self.inner = OffloadedModel(model, policy, disk=disk, dtype=dtype, revision=revision)
        self.budget = Budget(host_memory, None, Path(disk) if disk is not None else None)
        self.like, self.latency = Policy(cache_bits=cache_bits, attention=attention), latency
        self._planned: Workload | None = None
        self._solves = policy is None

    @classmethod
    def from_pretrained(cls, model: str | Path, **settings: Any) -> Self:
        """The same as the constructor."""
        return cls(model, **settings)

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def generation_config(self) -> GenerationConfig:
        found: GenerationConfig = self.inner.model.generation_config
        return found

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.skeleton.dtype

    @property
    def policy(self) -> Policy:
        """By which it runs now."""
        return self.inner.policy

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        **generation: Any,
    ) -> Tensor:
        """int64 [prompts, seq] -> [prompts, seq + new], an encoder-decoder's [prompts, 1 + new].

        Takes what a tokenizer gives (padded on the left, an encoder's on the right) and the fields of GenerationConfig.
        seed: for sampling; batch i draws as after `torch.manual_seed(seed + i)`.  Raises ResourceError for what is
        not done (beams, several sequences per prompt, dictionaries as output), or if the budget is too small.
        """
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            raise ResourceError("generate has no prompts", "give `input_ids`")
        settings = Generation.of(self.inner.model, generation, generation_config, ids.shape[1])
        work = Workload(ids.shape[0], ids.shape[1], settings.max_new_tokens)
        check_length(self.inner, work)
        if self._solves and not self._covers(work):
            plan = plan_offload(self.inner, work, self.budget, like=self.like, latency=self.latency)
            self.inner.adopt(plan.solved.policy)
            self._planned = work
        return self.inner.generate(ids, attention_mask, seed, generation_config=generation_config, **generation)

    def _covers(self, work: Workload) -> bool:
        """Whether the present policy was made for as much."""
        have = self._planned
        return (
            have is not None
            and work.prompt <= have.prompt
            and work.new <= have.new
            and have.prompts / 2 <= work.prompts <= have.prompts
        )

    def close(self) -> None:
        """Free memory, files and threads."""
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

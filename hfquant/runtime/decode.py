"""Greedy decoding with nothing between the tokens: a cache of fixed size and, on a GPU, one CUDA graph per token.

A step of a small model is a few hundred launches, each of which takes the CPU longer than it takes the GPU.  Captured
once as a graph they are one.  That needs memory that does not move, and Python that decides nothing from one token to
the next: transformers' static cache, and layers that are packed linear layers or dense.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from ..errors import ShapeError
from .experts import QExperts
from .kernels.triton.counters import counters

WARM_UP = 2  # steps before a graph is captured: kernels are compiled, and weights laid out for them


class Decoder:
    """Continues prompts of equal length, `batch` of them at a time, up to `length` tokens with the prompt.

    model: a decoder-only model of transformers, on the device that it is to run on.  graph: False never captures one.
    `eager_because` says why there is none.  Raises ShapeError for prompts that do not fit.
    """

    def __init__(self, model: Any, batch: int, length: int, graph: bool = True) -> None:
        self.model, self.batch, self.length = model, batch, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.device: torch.device = model.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.logits: Tensor | None = None
        self.eager_because = self._eager() if graph else "graph=False"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._counters: Tensor | None = None
        if self.eager_because is None:
            self._capture()

    def _eager(self) -> str | None:
        """Why the steps of this model cannot be a graph; None if they can."""
        if self.device.type != "cuda":
            return f"the model is on {self.device.type}"
        others = {type(layer).__name__ for layer in self.cache.layers if type(layer) is not StaticLayer}
        if others:
            return f"the cache has layers that grow in steps of their own: {', '.join(sorted(others))}"
        if any(isinstance(module, QExperts) for module in self.model.modules()):
            return "experts are chosen by the CPU"
        return None

    @torch.no_grad()
    def _capture(self) -> None:
        stream, main = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward()
        main.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with counters(self.device) as self._counters, torch.cuda.graph(self._graph):
            self._forward()
        self.cache.reset()

    def _forward(self) -> None:
        """A step: logits for what follows `token`, and the most likely one in its place."""
        self.logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> Tensor:
        """Begin anew with ids [batch, n]; logits [batch, vocabulary] for what follows, the most likely in `token`."""
        if ids.ndim != 2 or ids.shape[0] != self.batch or not 0 < ids.shape[1] <= self.length:
            raise ShapeError(
                f"prompts {list(ids.shape)} for a decoder of {self.batch} x {self.length} tokens",
                "give it [batch, n] token ids, n no longer than its length",
            )
        self.cache.reset()
        ids = ids.to(self.device)
        logits: Tensor = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        return logits[:, -1]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take `token` as it is, put the most likely next one in its place; logits [batch, vocabulary].

        They are overwritten by the next step.
        """
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()
        assert self.logits is not None
        return self.logits

    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The most likely `new_tokens` tokens after ids [batch, n], as [batch, new_tokens] on the model's device."""
        if ids.shape[-1] + new_tokens > self.length + 1:  # the last one is not read any more
            raise ShapeError(
                f"{ids.shape[-1]} tokens and {new_tokens} new ones, for a decoder of {self.length}",
                "make the decoder longer, or ask for fewer tokens",
            )
        self.prompt(ids)
        found = torch.empty(self.batch, new_tokens, dtype=torch.long, device=self.device)
        for i in range(new_tokens):
            found[:, i : i + 1] = self.token
            if i + 1 < new_tokens:
                self.step()
        return found

"""What a step that trains a finished block is given: the block, what it should put out, and where results go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..model.blocks import Weight, hidden
from ..tensors.layer import Quantized
from .activations import Stream
from .block import Finished
from .streaming import Passage


class Student:
    def __init__(self, block, done, masters, work, passage, index, original, stored) -> None:
        self.block, self.passage, self.index, self.stored = block, passage, index, stored
        self.before, self.after = original
        self.masters, self.work = masters, work
        self.weights: dict[Weight, Quantized] = {d.weight: d.Q for d in done}
        n = len(passage.batches)
        held = max(1, n // 8) if n > 1 else 0
        self.held = list(range(n - held, n)) or [0]
        self.train = list(range(n - held))
        self.rows: list[dict[str, Any]] = []
        self.changed: dict[str, Tensor] = {}
        self.energy = 1.0

    def master(self, weight: Weight) -> Tensor:
        W = self.masters[weight].float()
        return W.reshape(-1, W.shape[-1])

    def tokens(self, batch: int) -> int:
        return self.passage.batches[batch][1] * self.passage.stream.shape[0]

    def vectors(self) -> dict[str, Tensor]:
        return {n: p.detach().float() for n, p in self.block.named_parameters() if p.ndim == 1}

    def output(self, batch, weights, vectors, teacher_stream=False) -> Tensor:
        args, kwargs = self.passage.arguments(self.index, batch, self.before if teacher_stream else None)
        return self._run(weights, vectors, args, kwargs)

    def _run(self, weights, vectors, args, kwargs):
        values = {}
        for w, W in weights.items():
            p = self.block.get_parameter(w.name)
            values[w.name] = (W.T if w.kind == "conv1d" else W.view_as(p)).to(p.dtype)
        for n, v in vectors.items():
            p = self.block.get_parameter(n)
            r = v.to(self.stored).float()
            values[n] = (v + (r - v).detach()).to(p.dtype)
        return hidden(functional_call(self.block, values, args, kwargs))

    def target(self, mix: float):
        def get(batch):
            at, n = self.passage.batches[batch]
            t = self.after.read(at, n).float()
            if mix < 1:
                with torch.no_grad():
                    args, kwargs = self.passage.arguments(self.index, batch)
                    own = self._run({w: self.master(w) for w in self.weights}, {}, args, kwargs).float()
                t = mix * t + (1 - mix) * own
            return t
        return get

    def put(self, weight, Q):
        self.weights[weight] = Q
        weight.put(self.block, Q.dequantize().view(self.masters[weight].shape))

    def change(self, name, value):
        self.changed[name] = value.to(self.stored)
        self.block.get_parameter(name).data.copy_(self.changed[name])

    def report(self, **found):
        self.rows.append({"step": "lkd", "layers": [w.module for w in self.weights], **found})


def distill(block, steps, done, masters, work, passage, index, original, stored):
    student = Student(block, done, masters, work, passage, index, original, stored)
    for _, step in steps:
        step(student)
    return [replace(d, Q=student.weights[d.weight]) for d in done], student

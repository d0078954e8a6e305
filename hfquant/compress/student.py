"""Steps of scope "finished": a block whose weights are compressed learns to put out what the original one did."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..model.blocks import Weight, hidden
from ..tensors.layer import Layer, Quantized
from .activations import Stream
from .block import compress_block
from .observe import discover, observe
from .rounding import Rounding
from .solve import Finished, Work
from .streaming import HELD_OUT, Passage
from .view import Prepared


class Student:
    """A finished block as a function of its parameters, beside the original model's hidden states.

    weights: as they are now.  train, held: the numbers of the batches to learn from and to judge by, the same ones if
    there is only one.  changed: parameters that are not compressed, as they will be stored, by their name in the block.
    rows: what was done, for the report.
    """

    def __init__(
        self,
        block: nn.Module,
        weights: Mapping[Weight, Quantized],
        masters: Mapping[Weight, Tensor],
        passage: Passage,
        index: int,
        original: tuple[Stream, Stream],
        stored: torch.dtype,
    ) -> None:
        """original: the original model's hidden states before and after this block.  The rest: as in `BlockView`."""
        self.block, self.weights, self.passage, self.index, self.stored = block, dict(weights), passage, index, stored
        self.before, self.after = original
        self._masters = masters
        batches = len(passage.batches)
        held = max(1, batches // HELD_OUT) if batches > 1 else 0
        self.train = list(range(batches - held))
        self.held = list(range(batches - held, batches)) or self.train
        self.changed: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def original(self, weight: Weight) -> Tensor:
        """What a weight was before it was compressed, float32 [out, in], all experts' rows one after the other."""
        W, s = self._masters[weight].float().flatten(0, -2), self.weights[weight].input_scale
        return W if s is None else W / s  # masters are multiplied by what their inputs are divided by

    def vectors(self) -> dict[str, Tensor]:
        """The block's gains and biases as they are now, float32, by their name in the block."""
        return {name: p.detach().float() for name, p in self.block.named_parameters() if p.ndim == 1}

    def tokens(self, batch: int) -> int:
        return self.passage.batches[batch][1] * self.passage.stream.shape[0]

    def dtype(self, weight: Weight) -> torch.dtype:
        """What the block runs a weight in."""
        return self.block.get_parameter(weight.name).dtype

    def output(
        self, batch: int, weights: Mapping[Weight, Tensor], vectors: Mapping[str, Tensor], *, teacher: bool = False
    ) -> Tensor:
        """What the block puts out with these parameters [n, seq, hidden], differentiable in them.

        weights: [out, in] each, float32 or what they run in.  vectors: rounded here to the type they are stored in.
        teacher: it reads what the original block read, not what the compressed blocks before it put out.
        """
        args, kwargs = self.passage.arguments(self.index, batch, self.before if teacher else None)
        values = {}
        for weight, W in weights.items():
            own = self.block.get_parameter(weight.name)
            values[weight.name] = (W.T if weight.kind == "conv1d" else W.view_as(own)).to(own.dtype)
        for name, v in vectors.items():
            rounded = v.detach().to(self.stored).float()
            values[name] = (rounded + (v - v.detach())).to(self.block.get_parameter(name).dtype)
        return hidden(functional_call(self.block, values, args, kwargs))

    def target(self, batch: int) -> Tensor:
        """What the original block put out behind the original blocks before it, float32 [n, seq, hidden]."""
        at, n = self.passage.batches[batch]
        return self.after.read(at, n).to(self.passage.device, torch.float32)

    def finish(self, weights: Mapping[Weight, Quantized], vectors: Mapping[str, Tensor]) -> None:
        """From now on the block runs with these."""
        for weight, Q in weights.items():
            self.weights[weight] = Q
            weight.put(self.block, Q.dequantize().view(self._masters[weight].shape))
        for name, v in vectors.items():
            self.changed[name] = v.detach().to("cpu", self.stored, copy=True)
            self.block.get_parameter(name).data.copy_(self.changed[name])

    def errors(self) -> dict[Weight, float]:
        """‖(W − Ŵ)X‖ / ‖WX‖ of every weight on what it reads now in the held-out batches."""
        groups = discover(self.block, self.passage, self.index, list(self.weights))
        seen = observe(self.block, self.passage, self.index, groups, batches=self.held)
        found = {}
        for group in groups:
            for weight in group.members:
                W, Q = self.original(weight), self.weights[weight]
                rows = W.shape[0] // weight.experts(self.block)
                parts = [
                    Layer(name=weight.name, W=W[at], H=seen[group, e].H, Q=Q.rows(at)).error()
                    for e in range(weight.experts(self.block))
                    if (group, e) in seen
                    for at in [slice(e * rows, (e + 1) * rows)]
                ]
                if parts:
                    found[weight] = sum(parts) / len(parts)
        return found


@torch.no_grad()
def finish_block(
    block: nn.Module,
    masters: Mapping[Weight, Tensor],
    work: Work,
    prepared: Prepared,
    passage: Passage | None,
    index: int,
    rounding: Rounding,
    original: tuple[Stream, Stream] | None,
    stored: torch.dtype,
) -> Iterator[Finished]:
    """`compress_block`, and then the steps for finished blocks, which add to `prepared` what else they change.

    A block that no text reaches has nothing to learn from, one that is kept as it is nothing to make up for.
    """
    compressed = compress_block(block, masters, work, passage, index, rounding, original)
    if not work.final_steps or not work.grids or passage is None or original is None:
        yield from compressed
        return
    done = list(compressed)
    if passage.outputs is not None:  # they are those of weights that are about to change
        passage.outputs.close()
    student = Student(block, {d.weight: d.Q for d in done}, masters, passage, index, original, stored)
    for name, step in work.final_steps:
        begun = time.perf_counter()
        step(student)
        done = _after(name, done, student, time.perf_counter() - begun)
    prepared.changed |= student.changed
    prepared.rows += student.rows
    yield from done


def _after(name: str, done: Sequence[Finished], student: Student, seconds: float) -> list[Finished]:
    """What a step made of the weights.  Its time is shared out by their sizes."""
    errors, total = student.errors(), sum(before.Q.codes.numel() for before in done)
    found = []
    for before in done:
        error = errors.get(before.weight, before.error)
        trail = before.trail if error is None else (*before.trail, (name, error))
        took = before.seconds + seconds * before.Q.codes.numel() / total
        Q = student.weights[before.weight]
        found.append(replace(before, Q=Q, method=name, error=error, seconds=took, trail=trail))
    return found

"""Token-level contrastive distillation (QuantGPT, section 3.1), and distillation of the logits.

Of every token of a sequence, the student's representation has to be closer to the teacher's of the same token than to
the teacher's of the other tokens of that sequence.  With q normalized projections of the last hidden states, for
token i and the tokens S_i it is compared with (itself among them):

    ℓ_i = −log exp(q̄_i · q_i^T / τ) / Σ_{j ∈ S_i} exp(q̄_i · q_j^T / τ)

q̄_i is the student's representation, smoothed over the times that the token was seen: q̄_i ← m q̄_i + (1 − m) q_i^S.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax


class Projection(nn.Linear):
    """Last hidden states of student and teacher -> what is compared, as a part of the student's own call.

    Several processes share gradients of what is used inside a call alone: before it, the trainer leaves the teacher's
    states in `teacher`; after it, the student's output has both projections under `KEY`.
    """

    KEY = "hfquant_projected"
    NAME = "hfquant_projection"
    teacher: Tensor | None = None

    @classmethod
    def put(cls, student: nn.Module, hidden: int, width: int, seed: int) -> None:
        """Give it to a model; its states have `hidden` columns, what is compared has `width`."""
        own = cls(hidden, width, bias=False)
        nn.init.orthogonal_(own.weight, generator=torch.Generator().manual_seed(seed))
        student.add_module(cls.NAME, own)
        student.register_forward_hook(cls._called)

    @classmethod
    def _called(cls, student: nn.Module, args: Any, output: Any) -> dict[str, Any] | None:
        own: Any = getattr(student, cls.NAME)
        if own.teacher is None:
            return None
        projected, own.teacher = (own(last(output)), own(own.teacher)), None
        return {**output, cls.KEY: projected}  # a dict: torch makes copies of outputs, of which it knows the fields


def last(outputs: Any) -> Tensor:
    """The hidden states behind the last block of what writes."""
    found = outputs.decoder_hidden_states if "decoder_hidden_states" in outputs else outputs.hidden_states
    states: Tensor = found[-1]
    return states


class Bank:
    """The smoothed representations of all tokens seen so far, by sequence; in memory, in half precision."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._of: dict[int, Tensor] = {}

    def smooth(self, ids: Tensor, q: Tensor, mask: Tensor) -> Tensor:
        """q̄ of these sequences, now and for the next time.  ids int64 [n]; q [n, seq, dim] -> the same, normalized.

        mask bool [n, seq]: which are tokens; padding is at the end, and may be longer the next time.  Gradients go
        through the share of q.  What is seen for the first time is not smoothed.
        """
        if not self.momentum:
            return q
        past, lengths = q.detach().clone(), mask.sum(-1).tolist()
        for k, i in enumerate(ids.tolist()):
            if (known := self._of.get(i)) is not None:
                past[k, : len(known)] = known.to(past)
        smoothed = normalize(self.momentum * past + (1 - self.momentum) * q, dim=-1)
        for i, row, length in zip(ids.tolist(), smoothed.detach(), lengths, strict=True):
            self._of[i] = row[:length].to("cpu", torch.float16, copy=True)
        return smoothed

    def save(self, path: Path) -> None:
        """Into one file, which is there in full or not at all."""
        unfinished = path.with_suffix(".tmp")
        save_file({str(i): row.contiguous() for i, row in sorted(self._of.items())}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        self._of = {int(i): row for i, row in load_file(path).items()}

    def __len__(self) -> int:
        return len(self._of)


def contrastive(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float,
    negatives: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean of ℓ over the tokens that count.  student, teacher [n, seq, dim], normalized; mask bool [n, seq]

    negatives: how many of the other tokens of the sequence are drawn for S_i; 0: all.  Padding is in no S_i.
    """
    seq = student.shape[1]
    similar = student.float() @ teacher.float().transpose(1, 2) / temperature  # [n, seq, seq]
    allowed = mask[:, None, :].expand_as(similar)
    own = torch.eye(seq, dtype=torch.bool, device=mask.device)
    if 0 < negatives < seq - 1:
        drawn = torch.rand(similar.shape, generator=generator, device="cpu").to(mask.device)
        drawn = drawn.masked_fill(~allowed | own, -1.0)
        least = drawn.topk(negatives, dim=-1).values[..., -1:]
        allowed = allowed & (drawn >= least) & (drawn >= 0)
    similar = similar.masked_fill(~(allowed | own), -torch.inf)
    target = torch.arange(seq, device=mask.device).expand(similar.shape[0], seq)
    lost = cross_entropy(similar.flatten(0, 1), target.flatten(), reduction="none").view_as(mask)
    return (lost * mask).sum() / mask.sum().clamp(min=1)


def soft_cross_entropy(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """−Σ_v softmax(teacher)_v log softmax(student)_v, its mean over tokens by weight [n, seq].  [n, seq, vocabulary]"""
    lost = -(softmax(teacher.float(), -1) * log_softmax(student.float(), -1)).sum(-1)
    return (lost * weight).sum() / weight.sum().clamp(min=1e-12)


def token_scale(teacher: Tensor, labels: Tensor, mask: Tensor, temperature: float = 10.0) -> Tensor:
    """How much each token of a sequence counts, 1 on average: more where the teacher is less sure of what came.

    Token-scaled logit distillation (TSLD; Kim et al., 2023; arXiv:2308.06744): the softmax over a sequence of the
    teacher's own cross-entropy, divided by a temperature.  teacher [n, seq, vocabulary]; labels, mask [n, seq]
    """
    lost = cross_entropy(teacher.float().flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(mask)
    share = softmax((lost / temperature).masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.0)
    return share * mask.sum(-1, keepdim=True)

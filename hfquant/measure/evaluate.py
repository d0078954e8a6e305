"""Perplexity, and how far a compressed model's predictions are from the original's.

    perplexity = exp( 1/n Σ −log q(xₜ) )
    KL         = 1/n Σₜ Σᵥ pₜ(v) (log pₜ(v) − log qₜ(v))        p original, q compressed; nats per token
    top-1      = share of tokens where both rank the same token first
    s          = standard error of 1/n Σ (log p(xₜ) − log q(xₜ)), by how much the means of short stretches differ

The windows have one length, so the mean over tokens is the mean over windows of the GPTQ paper's protocol.
Logits come one window at a time, from any source; none are kept.

Compressed layers run with exact kernels unless told otherwise: the numbers are those of the weights, not of how a
kernel rounds what it reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..runtime import kernels
from .feed import Feed

STRETCH = 128  # tokens: of text whose losses are taken to be independent, and whose probabilities are held together
FEW = 8  # stretches: with fewer, how much they differ by is itself hardly known


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured, with what is needed to measure it again.

    tokens: predictions that were scored.  kl (nats per token), top1_agreement and reference_perplexity are
    None where there was no original to compare with.  growth_error: standard error of
    log(perplexity / reference_perplexity) as a mean over text of this kind; None for too little text to tell, too.
    """

    perplexity: float
    reference_perplexity: float | None = None
    growth_error: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tokens: int
    windows: int
    window: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For the report: plain numbers, text and dicts."""
        return asdict(self)


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor, feed: Feed | None = None, mode: str = "exact") -> Iterator[Tensor]:
    """The model's logits, window by window: [1, seq, vocab] each, in the dtype it computes in.

    windows int64 [n, seq].  Row t of the logits predicts token t + feed.shift.  mode: which kernels may run.
    """
    feed = feed or Feed(model.config)
    model.eval()
    for window in windows.split(1):
        with kernels.mode(mode):
            found = model(**to(feed.inputs(window), model), use_cache=False, return_dict=True).logits
        yield found


def to(inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs on the model's device, in its dtype where they are not token ids."""
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def perplexity(model: PreTrainedModel, windows: Tensor, *, feed: Feed | None = None) -> Scores:
    """Perplexity of a model on windows int64 [n, seq]."""
    return compare(None, model, windows, feed=feed)


def compare(
    reference: Iterable[Tensor] | None,
    model: PreTrainedModel,
    windows: Tensor,
    *,
    feed: Feed | None = None,
    mode: str = "exact",
) -> Scores:
    """Score a model on windows int64 [n, seq], against the original's logits for the same windows.

    `reference` yields [1, seq, vocab] per window, as `logits` of the original does; None scores the model
    alone.  mode: which kernels may run, see `runtime.kernels`.  Raises CheckpointError if original and model do not
    have the same vocabulary.
    """
    feed = feed or Feed(model.config)
    scores = score(reference, logits(model, windows, feed, mode), windows, feed)
    settings = {
        "feed": feed.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "kernels": mode,
    }
    return Scores(**{**scores.to_dict(), "settings": settings})


def score(reference: Iterable[Tensor] | None, candidate: Iterable[Tensor], windows: Tensor, feed: Feed) -> Scores:
    """The numbers alone: logits [1, seq, vocab] of both models per window of windows [n, seq]."""
    originals = [None] * len(windows) if reference is None else reference
    stretches = []
    for window, original, found in zip(windows, originals, candidate, strict=True):
        rows = None if original is None else feed.predicted(original[0])
        stretches.append(_sums(rows, feed.predicted(found[0]), feed.targets(window)))
    sums = torch.cat(stretches)
    n = len(windows) * (windows.shape[1] - feed.shift)
    loss, original_loss, kl, same = (sums[:, 1:].sum(0) / n).tolist()
    alone = Scores(perplexity=_exp(loss), tokens=n, windows=len(windows), window=windows.shape[1])
    if reference is None:
        return alone
    compared = {
        "reference_perplexity": _exp(original_loss),
        "growth_error": _standard_error(sums[:, 1] - sums[:, 2], sums[:, 0]),
        "kl": max(kl, 0.0) if kl == kl else kl,
    }
    return Scores(**{**alone.to_dict(), **compared, "top1_agreement": same})


def _exp(loss: float) -> float:
    """e^loss; a loss that is too large for it, or not a number, stays visible as inf or NaN."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def _standard_error(totals: Tensor, counts: Tensor) -> float | None:
    """Of Σ totals / Σ counts, of stretches [n] of text that are taken to be independent: "batch means", as tokens that
    follow each other are not.  None for few."""
    n = len(totals)
    if n < FEW:
        return None
    left = totals - counts * totals.sum() / counts.sum()
    return float((n / (n - 1) * left.square().sum()).sqrt() / counts.sum())


def _sums(reference: Tensor | None, found: Tensor, targets: Tensor) -> Tensor:
    """Of the stretches of one window, `STRETCH` tokens each: tokens, and the sums over them of the loss, the original's
    loss, KL, agreements.  float64 [stretches, 5]

    reference, found [n, vocab] in any float dtype; targets [n].  Log-probabilities are taken in float32.
    """
    if reference is not None and reference.shape != found.shape:
        raise CheckpointError(
            f"the original's logits are {list(reference.shape)}, the compressed model's {list(found.shape)}",
            "compare a compressed model with the model it was made from",
        )
    begins = range(0, len(targets), STRETCH)
    sums = torch.zeros(len(begins), 5, dtype=torch.float64)
    for row, a in zip(sums, begins, strict=True):
        q = found[a : a + STRETCH].float().log_softmax(-1)
        x = targets[a : a + STRETCH].to(q.device)[:, None]
        row[0] = len(x)
        row[1] = -q.gather(1, x).double().sum().cpu()
        if reference is None:
            continue
        p = reference[a : a + STRETCH].to(q.device).float().log_softmax(-1)
        row[2] = -p.gather(1, x).double().sum().cpu()
        row[3] = kl_divergence(p, q).sum().cpu()
        row[4] = (p.argmax(-1) == q.argmax(-1)).sum().cpu()
    return sums


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Σᵥ p(v) (log p(v) − log q(v)) of log-probabilities [n, vocab] -> float64 [n]"""
    terms = p.exp() * (p - q)
    # 0 · log 0 is 0: a token that the original rules out costs nothing
    return terms.masked_fill_(p == -torch.inf, 0).sum(-1, dtype=torch.float64)

"""How fast a compressed model is beside its original, and why: kernels, bytes, bandwidth.

Decoding one token reads every weight once: bytes of the weights / bandwidth of the memory is the least it can take, and
what is reached of that the share of the limit.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import report
from ..errors import RecipeError
from ..machine import hardware, peak_memory, versions
from ..model.inputs import longest
from ..plugin import load
from ..runtime import cache, kernels
from ..runtime.experts import QExperts
from ..runtime.nn import Packed, QEmbedding, QLinear
from .generate import greedy
from .original import loaded, opened
from .verify import original_of

SWEEP = 1 << 27  # bytes that no cache holds


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians over rounds: of the prompt, and of one token after the other."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Kind:
    """Layers of one shape [out, in] and encoding: how many, which kernel takes a single token and which the prompt, and
    why those before the first of them do not."""

    shape: tuple[int, int]
    encoding: str
    layers: int
    decode: str
    prefill: str
    refused: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured.

    original: None where it is not known or does not fit into memory.  bandwidth: bytes a second that torch's threads
    read. memory: bytes; stored: the packed components, kernels: what was derived from them.  load: seconds; first:
    of the first prompt beyond what later ones take.
    """

    compressed: Speed
    original: Speed | None
    kinds: tuple[Kind, ...]
    bytes_per_token: int
    bandwidth: float
    memory: dict[str, int]
    load: dict[str, float]
    settings: dict[str, Any]

    @property
    def share(self) -> float:
        """Of the speed that reading the weights allows."""
        return self.compressed.decode * self.bytes_per_token / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share_of_bandwidth": self.share}


def bench(
    out: str | Path,
    *,
    against: str | Path | None = None,
    prompt: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    dtype: str | torch.dtype = "auto",
    mode: str = "auto",
    into_report: bool = False,
) -> Bench:
    """Run the checkpoint in `out` and its original in turns, batch 1, greedily.

    against: the original, by default the one that the report names; alone where there is none.  prompt, new_tokens:
    how many tokens.  mode: which kernels may run.  Raises CheckpointError as `load` does, KernelError for kernels
    that do not exist, RecipeError where prompt and new tokens are more than the model's positions.
    """
    kernels.allowed(mode)
    began = time.perf_counter()
    model = load(out, dtype=dtype).eval()
    opening = time.perf_counter() - began
    limit = longest(model.config)
    if limit is not None and prompt + new_tokens > limit:
        raise RecipeError(
            f"{prompt} + {new_tokens} tokens are more than the model's {limit} positions", "give it fewer of them"
        )
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, prompt), generator=_seeded())
    with opened(*original_of(report.read(Path(out)), against)) as source, kernels.mode(mode):
        first = _round(model, ids, new_tokens)
        original = None if source is None else loaded(source, model.dtype)
        ours, theirs = _in_turns(model, original, ids, new_tokens, rounds)
        done = Bench(
            compressed=_speed(ours),
            original=_speed(theirs) if theirs else None,
            kinds=tuple(kinds(model, prompt)),
            bytes_per_token=bytes_per_token(model),
            bandwidth=bandwidth(),
            memory=_memory(model),
            load={"open": opening, "first": prompt / first.prefill - prompt / _speed(ours).prefill},
            settings={
                "prompt": prompt,
                "new_tokens": new_tokens,
                "rounds": rounds,
                "batch": 1,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
                "kernels": mode,
                "threads": torch.get_num_threads(),
                "hardware": hardware(),
                "versions": versions(),
            },
        )
    if into_report:
        report.merge(Path(out), bench=done.to_dict())
    return done


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _in_turns(
    model: PreTrainedModel, original: PreTrainedModel | None, ids: Tensor, new_tokens: int, rounds: int
) -> tuple[list[Speed], list[Speed]]:
    """Both, one after the other, so that whatever else the machine does hits both alike."""
    ours, theirs = [], []
    if original is not None:
        _round(original, ids, 2)  # its first call is not representative either
    for _ in range(rounds):
        ours.append(_round(model, ids, new_tokens))
        if original is not None:
            theirs.append(_round(original, ids, new_tokens))
    return ours, theirs


def _round(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Speed:
    began = time.perf_counter()
    tokens, times = greedy(model, ids.to(model.device), new_tokens)
    return Speed(ids.shape[1] / (times[0] - began), (len(tokens) - 1) / (times[-1] - times[0]))


def _speed(rounds: list[Speed]) -> Speed:
    return Speed(statistics.median(r.prefill for r in rounds), statistics.median(r.decode for r in rounds))


def kinds(model: nn.Module, prompt: int) -> Iterator[Kind]:
    """The kinds of packed linear layers in a model, in its order, as the kernels would choose here and now."""
    counted: dict[tuple[str, str, tuple[int, int]], list[QLinear]] = {}
    for module in model.modules():
        if isinstance(module, QLinear):
            counted.setdefault((module.fmt.name, str(module.encoding), module.shape), []).append(module)
    for (_, encoding, shape), layers in counted.items():
        layer = layers[0]
        rows = [torch.empty(n, shape[1], dtype=layer.dtype, device=layer.parts[0].device).zero_() for n in (1, prompt)]
        one, many = (kernels.choose(x, layer.matrix) for x in rows)
        yield Kind(shape, encoding, len(layers), one.kernel.name, many.kernel.name, dict(one.refused))


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of all weights that one token is multiplied by: of a table only where the head shares it, of experts the
    share that is active."""
    total, seen = 0.0, set()
    config = getattr(model, "config", None)
    for module in model.modules():
        if isinstance(module, (QEmbedding, nn.Embedding)) and not isinstance(module, QLinear):
            continue
        share = 1.0
        if isinstance(module, QExperts):
            share = getattr(config, "num_experts_per_tok", module.num_experts) / module.num_experts
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.nbytes * share
    return round(total)


def bandwidth() -> float:
    """Bytes a second that torch's threads read from memory."""
    memory, best = torch.zeros(SWEEP // 8, dtype=torch.int64), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - began)
    return SWEEP / best


def _memory(model: nn.Module) -> dict[str, int]:
    packed = {id(p): p.nbytes for m in model.modules() if isinstance(m, Packed) for p in m.parts}
    packed |= {
        id(p): p.nbytes for m in model.modules() if isinstance(m, QExperts) for name in m.packed for p in m.parts(name)
    }
    every = {id(p): p.nbytes for p in model.parameters()}
    stored, total = sum(packed.values()), sum(every.values())
    return {"stored": stored, "other": total - stored, "kernels": cache.size(), "peak": peak_memory()}

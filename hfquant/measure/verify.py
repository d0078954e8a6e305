"""Reload a checkpoint from disk, measure it against the original, write report and card, then judge."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import report
from ..errors import CheckpointError
from ..machine import Footprint, hardware, multiplies_bfloat16, peak_memory, versions
from ..memory import give_back
from ..model.inputs import longest
from ..model.source import Source
from ..model.stream import stream_logits
from ..plugin import load
from ..recipe_parts import Gate
from ..runtime.kernels import allowed
from ..tensors import formats
from . import card
from .evaluate import Scores, compare
from .gate import gate, verdict
from .generate import Sample, sample
from .original import facts, loaded, opened
from .scan import scan
from .tasks import Tasks, check_lengths, compared, run
from .text import PACKAGED, Text, cut, read_text

WINDOW = 512  # tokens
PROMPT_TOKENS = 16
NEW_TOKENS = 32
NOISE = 20_000_000  # bytes of a model: what a smaller one takes is lost in what the process takes and gives back


def verify(
    out: str | Path,
    *,
    against: str | Path | Source | None = None,
    text: str | Path | None = None,
    windows: int | None = 64,
    window_len: int = WINDOW,
    dtype: str | torch.dtype = "auto",
    prompt: str | None = None,
    new_tokens: int = NEW_TOKENS,
    tasks: Tasks | None = None,
    enforce: bool = True,
    loader: Callable[..., PreTrainedModel] = load,
    kernels: str = "exact",
) -> dict[str, Any]:
    """Measure the checkpoint in `out` -> the whole report, which is also in `out`/report.json.

    against: the original (folder, Hub id, GGUF file, or opened already); by default the one the report names; where
    there is none, the model is scored alone and the gate, which compares, is left as it was.
    text: a file, by default the packaged text.
    windows, window_len: how many, from the start of the text (None for all), and tokens in each, fewer where
    the model cannot have as many.
    dtype: in which both models compute; "auto" is the checkpoint's own, and for the scores float32 where the
    processor has no products of 16 bits.
    prompt: by default the first words of the text.
    tasks: asked of both models, of the original only if it fits into memory.
    enforce: raise if the report does not reach the recipe's gate.
    loader: called as `loader(out, dtype=...)`.
    kernels: which may run while scores are taken (see `runtime.kernels`); speed and sample are those of the default.

    Report and card (README.md) are written before the gate is applied.  Raises CheckpointError for a damaged
    checkpoint, SourceError for an original that cannot be opened, CalibrationError for an unusable text or a task whose
    answers are longer than what the model can read, KernelError for kernels that do not exist, and QualityError from
    the gate.
    """
    allowed(kernels)
    folder, began = Path(out), time.perf_counter()
    known, whole = report.read(folder), scan(folder)
    tokenizer = _tokenizer(folder)
    wanted = read_text(PACKAGED if text is None else text)
    config = AutoConfig.from_pretrained(folder)
    limit = longest(config)
    if tasks is not None:
        check_lengths(tasks, tokenizer, limit)
    ids = cut(wanted, tokenizer, min(window_len, limit or window_len), windows)
    start = prompt or _words(str(tokenizer.decode(ids[0, :PROMPT_TOKENS], skip_special_tokens=True)))
    with opened(*original_of(known, against)) as source:
        before = Footprint()
        model = loader(folder, dtype=dtype)
        kind = model.dtype
        exact = _quick(model) if dtype == "auto" else kind
        scores = _scores(model if exact == kind else loader(folder, dtype=exact), source, ids, kernels)
        asked = _ask(model, tokenizer, start, new_tokens, tasks, before)
        output = _output(folder, model)
        del model  # before the original is loaded
        original = None if source is None else _original_asked(source, kind, tokenizer, start, new_tokens, tasks)
        wire = known.get("wire") or _wire(config)
        sections = {
            "source": _source(known, source),
            "wire": wire,
            "output": {**output, **known.get("output", {}), **{k: v for k, v in output.items() if k != "files"}},
        }
    evaluation = {
        **_settled(scores, wanted, windows),
        **_told(asked, original),
        "scan": whole,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": peak_memory(),
        "hardware": hardware(),
        "versions": versions(),
    }
    texts = {"prompt": start, "original": original and original.said.text, "compressed": asked.said.text}
    done = report.merge(folder, **sections, evaluation=evaluation, sample=texts)
    limits = Gate(**(done.get("recipe") or {}).get("gate") or {})
    if scores.reference_perplexity is not None:
        done = report.merge(folder, gate=verdict(done, limits))
    card.write(folder, done)
    if enforce and scores.reference_perplexity is not None:
        gate(done, limits)
    return done


def _words(text: str) -> str:
    """Without what may be the first half of a word at the end, and without space there."""
    *before, last = text.split() or [""]
    if before and not text[-1].isspace():
        text = text.removesuffix(last)
    return text.rstrip()


def _wire(config: PretrainedConfig) -> dict[str, Any] | None:
    """The report's `wire` section for a checkpoint whose report does not tell; None if it is not compressed."""
    stored = getattr(config, "quantization_config", None)
    return {"format": formats.parse(stored).format, "config": dict(stored)} if stored else None


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer: {str(error).splitlines()[0]}",
            "copy the original model's tokenizer files there",
        ) from error
    return found


def original_of(
    known: Mapping[str, Any], against: str | Path | Source | None
) -> tuple[str | Path | Source | None, str | None]:
    """What to compare with, and its revision."""
    if against is not None:
        return against, None
    source = known.get("source") or {}
    return source.get("id"), source.get("revision")


def _quick(model: PreTrainedModel) -> torch.dtype:
    """The type for many tokens at once: float32 instead of one that this processor multiplies slowly."""
    slow = model.device.type == "cpu" and model.dtype.itemsize < 4 and not multiplies_bfloat16()
    return torch.float32 if slow else model.dtype


def _scores(model: PreTrainedModel, source: Source | None, windows: Tensor, mode: str) -> Scores:
    originals = None if source is None else stream_logits(source, windows, dtype=model.dtype)
    return compare(originals, model, windows, mode=mode)


def check_text(source: Source, text: str | Path | None) -> None:
    """Raises CalibrationError for a text that what becomes of this model could not be measured on."""
    if text is not None:
        cut(read_text(text), source.tokenizer(), min(WINDOW, longest(source.config) or WINDOW), 1)


def _settled(scores: Scores, text: Text, windows: int | None) -> dict[str, Any]:
    """The scores, and in their settings what they were measured on."""
    chosen = "all windows of the text" if windows is None else "the first windows of the text"
    settings = {**scores.settings, "text": text.name, "sha256": text.sha256, "selection": chosen}
    return {**scores.to_dict(), "settings": settings}


@dataclass(frozen=True)
class _Asked:
    """What a loaded model said, the memory that took with its weights, and its scores at tasks."""

    said: Sample
    memory: int | None
    tasks: dict[str, dict[str, Any]] | None


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
    tasks: Tasks | None,
    before: Footprint,
) -> _Asked:
    give_back()  # what scoring took
    said, memory = before.of(lambda: sample(model, tokenizer, prompt, new_tokens))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if memory is not None and (held < NOISE or memory < held / 2):
        memory = None
    return _Asked(said, memory, None if tasks is None else run(tasks, model, tokenizer))


def _original_asked(
    source: Source,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
    tasks: Tasks | None,
) -> _Asked | None:
    before = Footprint()
    model = loaded(source, dtype)
    return None if model is None else _ask(model, tokenizer, prompt, new_tokens, tasks, before)


def _told(asked: _Asked, original: _Asked | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "tokens_per_second": asked.said.tokens_per_second,
        "reference_tokens_per_second": original.said.tokens_per_second if original else None,
        "generation_memory_bytes": asked.memory,
        "reference_generation_memory_bytes": original.memory if original else None,
    }
    if asked.tasks is not None:
        told["tasks"] = compared(asked.tasks, original.tasks if original else None)
    return told


def _source(known: Mapping[str, Any], source: Source | None) -> dict[str, Any]:
    """What the report says of the original; what it said before is kept."""
    said: dict[str, Any] = dict(known.get("source") or {})
    if source is None:
        return said
    found = {
        "id": source.id,
        "revision": source.revision,
        "bytes": source.total_bytes,
        "parameters": source.parameters,
        "dtype": str(source.dtype).removeprefix("torch."),
        **facts(source),
    }
    return {**found, **{key: value for key, value in said.items() if value is not None}}


def _output(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name not in (report.FILE, card.FILE))
    return {
        "bytes": sum(f.stat().st_size for f in files if f.suffix == ".safetensors"),
        "files": [f.name for f in files],
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "encoder_decoder": bool(model.config.is_encoder_decoder),
    }

"""Everything that can go wrong with a training, before it starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..compress.journal import Journal
from ..compress.layout import Layout, lay_out
from ..compress.plan import check_begun, check_device, check_out
from ..errors import RecipeError, ResourceError, TrainingError
from ..methods.quantgpt import Method
from ..model.source import Source, open_source
from ..model.survey import survey
from ..recipe import Recipe
from .data import Sequences, check, digest, sequences
from .options import decide, read_options
from .trainer import last_checkpoint


@dataclass(frozen=True, kw_only=True)
class Training(Layout):
    """A training, checked.

    text: as the user named it.  options: `transformers.TrainingArguments` that the user gave.  resume: the checkpoint
    that it goes on from.  sha256: of the sequences.
    """

    source: Source
    recipe: Recipe
    method: Method
    out: Path
    text: str
    sequences: Sequences
    sha256: str
    options: Mapping[str, Any]
    device: str
    journal: Journal
    fingerprint: Mapping[str, Any]
    resume: Path | None
    save_every: int
    fresh: bool

    @property
    def checkpoints(self) -> Path:
        return self.journal.folder / "train"

    @property
    def processes(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def batch(self) -> int:
        """Sequences that one process runs at once."""
        return self.method.batch // (self.processes * int(self.options.get("gradient_accumulation_steps", 1)))


def plan(
    model: str | Path | Source,
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    text: str,
    out: str | Path,
    *,
    options: Sequence[str] = (),
    save_every: int = 500,
    fresh: bool = False,
    device: str = "cpu",
) -> Training:
    """Check a training.  Nothing is written but an unpacked GGUF source, and nothing at all if it is refused.

    text: a file, a Hub dataset, `default`, or a `.jsonl` file of pairs.  options: `KEY=VALUE` of
    `transformers.TrainingArguments`.  save_every: optimizer steps between checkpoints.
    Raises an HfquantError for whatever would stop the work later.
    """
    chosen, out = Recipe.parse(recipe), Path(out).expanduser()
    if not chosen.trains:
        raise RecipeError(
            f"recipe `{chosen.name}` does not train the model",
            "use `hfquant compress`, or a recipe such as `quantgpt-w2a8`",
        )
    method = chosen.steps[0].build()
    assert isinstance(method, Method)
    given, journal = read_options(options), Journal(out)
    check_device(device)
    if torch.device(device).index:
        raise ResourceError(
            f"the Trainer would not use `{device}`", "say `--device cuda`, and choose with CUDA_VISIBLE_DEVICES"
        )
    check_out(out, journal, fresh)
    with journal.untouched():
        source = model if isinstance(model, Source) else open_source(model, staging=journal.source)
        laid = lay_out(source, chosen, device, training=True)
        _check_targets(laid)
        pairs = bool(source.config.is_encoder_decoder)
        items = sequences(text, source.tokenizer(), seq_len=method.seq_len, pairs=pairs)
        check(items, source.config)
        sha256 = digest(items)
        fingerprint = {
            "hfquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "source": survey(source, laid.dtype), "recipe": chosen.hash, "text": sha256, "format": laid.wire.format,
            "dtype": str(laid.dtype), "device": torch.device(device).type, "options": decide(given),
            "processes": os.environ.get("WORLD_SIZE", "1"),
        }  # fmt: skip
        if not fresh:
            check_begun(journal, fingerprint, out)
        found = Training(
            **vars(laid), source=source, recipe=chosen, method=method, out=out, text=text, sequences=items,
            sha256=sha256, options=given, device=device, journal=journal, fingerprint=fingerprint,
            save_every=save_every, fresh=fresh, resume=None,
        )  # fmt: skip
        _check_batch(found)
    resume = None if fresh or journal.plan() is None else last_checkpoint(found.checkpoints, found.processes)
    return Training(**{**vars(found), "resume": resume})


def _check_targets(laid: Layout) -> None:
    for target in laid.targets.values():
        if target.kind == "experts":
            raise RecipeError(
                f"`{target.layer}` are fused experts, which cannot be trained on a grid",
                f"keep them: `--set keep=[{target.layer}]`, or use `hfquant compress`",
            )
        if not target.grid.symmetric:
            raise RecipeError(
                f"`quantgpt` has levels on both sides of zero, but `{target.layer}` gets the asymmetric {target.grid}",
                f"write `{target.grid}sym`",
            )


def _check_batch(found: Training) -> None:
    parts = found.processes * int(found.options.get("gradient_accumulation_steps", 1))
    if found.method.batch % parts:
        raise TrainingError(
            f"a batch of {found.method.batch} sequences cannot be shared by {parts} (processes x accumulation steps)",
            f"use `--set quantgpt.batch={max(1, found.method.batch // parts) * parts}`",
        )
    if found.processes > 1 and found.method.quantizer == "laq" and "deepspeed" in found.options:
        raise TrainingError("`quantizer: laq` needs whole moments, which ZeRO shares out", "leave `deepspeed` out")

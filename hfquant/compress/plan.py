"""Everything that can be known, and everything that can go wrong, before any work starts."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..errors import CalibrationError, CheckpointError, ResourceError
from ..model.calibration import digest, self_generated, token_batches
from ..model.inputs import longest, vocabulary
from ..model.source import Source, open_source
from ..model.survey import survey
from ..recipe import Recipe
from ..report import FILE, read
from ..tensors.formats import Wire
from .crew import ALONE, Crew
from .estimate import Estimate
from .journal import Journal
from .layout import Layout, fit, lay_out
from .rewriting import rewritten


@dataclass(frozen=True, kw_only=True)
class Plan(Layout):
    """A layout of a compression, checked and estimated.

    layers: by parameter name.  batch: samples that run together.  room: bytes of statistics that are held together.
    resumed: blocks that are already finished.
    """

    source: Source
    recipe: Recipe
    out: Path
    tokens: Tensor | None
    batch: int
    room: int
    device: str
    crew: Crew
    journal: Journal
    fingerprint: Mapping[str, Any]
    estimate: Estimate
    resumed: int
    fresh: bool = False

    @property
    def blocks(self) -> int:
        """Units of work that the journal knows: the blocks, and the two ends of the model where they change too."""
        ends = any(layer.block == len(self._names) for layer in self.layers.values())
        return len(self._names) + ends

    @property
    def _names(self) -> list[str]:
        return [name for stack in self.stacks for name in stack.blocks]


def plan(
    model: str | Path | Source,
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    out: str | Path,
    *,
    calibration: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    fresh: bool = False,
    max_memory: int | None = None,
    device: str = "cpu",
    crew: Crew = ALONE,
) -> Plan:
    """Check a compression and estimate what it will need.

    Nothing is written but an unpacked GGUF source, and nothing at all if the run is refused.

    model: folder, GGUF file or Hub id, or what `open_source` made of one.  max_memory: bytes; batches are made
    smaller to stay below it, and statistics gathered in more runs.  crew: who does the work, with `device` for this
    process' own share of it.
    Raises an HfquantError for whatever would stop the work later.
    """
    chosen = _with_calibration(Recipe.parse(recipe), source=calibration, samples=samples, seq_len=seq_len, seed=seed)
    out, journal = Path(out).expanduser(), Journal(Path(out).expanduser())
    check_device(device)
    check_out(out, journal, fresh)
    where = device if crew.parts == 1 else crew.device
    with journal.untouched():
        source = model if isinstance(model, Source) else open_source(model, staging=journal.source)
        laid = lay_out(rewritten(source, chosen, outline=True), chosen, where)
        tokens = _tokens(source, chosen, laid.skeleton.model)
        identity = survey(source, laid.dtype)
        if chosen.rewrites:
            source = rewritten(source, chosen)
            laid = lay_out(source, chosen, where)
        batch, room, expected = fit(laid, chosen, tokens, max_memory, crew.parts)
        fingerprint = _fingerprint(identity, chosen, tokens, laid.wire, laid.dtype, where) | {
            "batch": batch,
            "compute_dtype": str(laid.skeleton.dtype),
            "parts": crew.parts,
        }
        resumed = 0 if fresh else resumed_blocks(journal, fingerprint, out)
        _check_disk(out, expected)
    return Plan(
        **vars(laid), source=source, recipe=chosen, out=out, tokens=tokens, batch=batch, room=room, device=device,
        crew=crew, journal=journal, fingerprint=fingerprint, estimate=expected, resumed=resumed, fresh=fresh,
    )  # fmt: skip


def _with_calibration(recipe: Recipe, **changes: Any) -> Recipe:
    given = {key: value for key, value in changes.items() if value is not None}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=given)}) if given else recipe


def check_device(device: str) -> None:
    """Raises ResourceError for a device that is not there, or not supported."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ResourceError(f"unknown device `{device}`", "use `cpu`, `cuda` or `cuda:0`") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError("there is no CUDA device here", "leave out `--device`: the CPU path needs nothing else")
    if kind not in ("cpu", "cuda"):
        raise ResourceError(f"device `{device}` is not supported", "use `cpu` or `cuda`")


def check_out(out: Path, journal: Journal, fresh: bool) -> None:
    """Raises CheckpointError for a folder that may not be written to."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"`{out}` is a file", "give a folder for the result")
    if not out.exists() or not any(out.iterdir()) or journal.folder.is_dir():
        return
    if _is_ours(out):
        if fresh:
            return
        raise CheckpointError(
            f"`{out}` already holds a finished model", "use `--fresh` to replace it, or another folder"
        )
    raise CheckpointError(f"`{out}` is not empty and not hfquant's", "give an empty or a new folder")


def _is_ours(out: Path) -> bool:
    return (out / FILE).is_file() and "output" in read(out)


def clear(out: Path, journal: Journal) -> None:
    """Remove what an earlier run left, and nothing else; an unpacked source stays."""
    names = read(out)["output"]["files"] if _is_ours(out) else []
    for name in [*names, *journal.moved(), FILE, "README.md"] if names or journal.moved() else ():
        if not Path(name).is_absolute() and ".." not in Path(name).parts:
            (out / name).unlink(missing_ok=True)
    journal.forget()


def _tokens(source: Source, recipe: Recipe, model: Any) -> Tensor | None:
    if not recipe.needs_calibration:
        return None
    c = recipe.calibration
    limit = longest(source.config)
    if limit is not None and c.seq_len > limit:
        raise CalibrationError(
            f"calibration sequences of {c.seq_len} tokens are longer than the model's {limit}",
            f"use `--seq-len {limit}`",
        )
    if c.source == "self":
        dense = type(model).from_pretrained(source.path, dtype=torch.float32)
        return self_generated(dense, samples=c.samples, seq_len=c.seq_len, seed=c.seed)
    tokenizer = None if c.source.endswith(".npy") else source.tokenizer()
    tokens = token_batches(c.source, tokenizer, samples=c.samples, seq_len=c.seq_len, seed=c.seed)
    if int(tokens.max()) >= vocabulary(source.config) or int(tokens.min()) < 0:
        raise CalibrationError(
            f"the calibration tokens reach {int(tokens.max())}, "
            f"the model's vocabulary ends at {vocabulary(source.config)}",
            "the tokenizer does not belong to this model",
        )
    return tokens


def _fingerprint(
    identity: str, recipe: Recipe, tokens: Tensor | None, wire: Wire, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """What decides the bytes: a run with another fingerprint cannot continue this one."""
    return {
        "hfquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "source": identity,
        "recipe": recipe.hash,
        "calibration": None if tokens is None else digest(tokens),
        "format": wire.format,
        "dtype": str(dtype),
        "device": torch.device(device).type,
    }


def resumed_blocks(journal: Journal, fingerprint: Mapping[str, Any], out: Path) -> int:
    """How many are finished.  Raises CheckpointError where what was begun is another work."""
    begun = journal.plan()
    if begun is None:
        return 0
    if different := sorted(key for key in fingerprint if begun.get(key) != fingerprint[key]):
        raise CheckpointError(
            f"`{out}` holds an unfinished run with another {' and '.join(different)}",
            "finish it with the settings it was begun with, or start again with `--fresh`",
        )
    return len(journal.entries())


def _check_disk(out: Path, expected: Estimate) -> None:
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < expected.disk:
        raise ResourceError(
            f"about {expected.disk / 1e6:,.0f} MB of disk are needed for `{out}`, {free / 1e6:,.0f} MB are free",
            "free some space, or write to another disk",
        )

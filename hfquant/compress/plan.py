"""Everything that can be known, and everything that can go wrong, before any work starts."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..errors import CalibrationError, CheckpointError, ResourceError
from ..machine import most_memory
from ..model.calibration import digest, random_tokens, self_generated, token_batches
from ..model.inputs import longest, vocabulary
from ..model.source import Source, open_source
from ..model.survey import survey
from ..recipe import Calibration, Recipe
from ..recipe_errors import validate
from ..report import FILE, read
from ..tensors.formats import Wire
from .crew import ALONE, Crew
from .estimate import Estimate
from .journal import Journal
from .layout import Layout, fit, lay_out
from .measuring import Measuring, measuring
from .rewriting import rewritten


@dataclass(frozen=True, kw_only=True)
class Outlook(Layout):
    """What is known of a compression from config and headers alone, before a weight is read.

    layers: by parameter name.  batch: samples that run together.  room: bytes of statistics that are held together.
    resumed: blocks that an earlier run finished; whether it was the same work is known when all of the model was read.
    """

    source: Source
    recipe: Recipe
    out: Path
    batch: int
    room: int
    estimate: Estimate
    resumed: int

    @property
    def blocks(self) -> int:
        """Units of work that the journal knows: the blocks, and the two ends of the model where they change too."""
        ends = any(layer.block == len(self._names) for layer in self.layers.values())
        return len(self._names) + ends

    def measuring(self, windows: int) -> Measuring:
        """What it will take to measure the result."""
        return measuring(self, self.estimate, windows)

    @property
    def _names(self) -> list[str]:
        return [name for stack in self.stacks for name in stack.blocks]


@dataclass(frozen=True, kw_only=True)
class Plan(Outlook):
    """A compression, checked: nothing that can be known beforehand will stop it."""

    tokens: Tensor | None
    device: str
    crew: Crew
    journal: Journal
    fingerprint: Mapping[str, Any]
    fresh: bool = False


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
    announce: Callable[[Outlook], object] | None = None,
) -> Plan:
    """Estimate what a compression will need, and check it.

    Nothing is written but an unpacked GGUF source, and nothing at all if the run is refused.  What cannot fit is
    refused before a weight is read; then all of them are, once.

    model: folder, GGUF file or Hub id, or what `open_source` made of one.  max_memory: bytes, by default what the
    machine has; batches are made smaller to stay below it, and statistics gathered in more runs.  crew: who does the
    work, with `device` for this process' own share of it.  announce: called with the estimate as soon as it is known.
    Raises an HfquantError for whatever would stop the work later.
    """
    chosen = with_calibration(Recipe.parse(recipe), source=calibration, samples=samples, seq_len=seq_len, seed=seed)
    out, journal = Path(out).expanduser(), Journal(Path(out).expanduser())
    check_device(device)
    check_out(out, journal, fresh)
    where = device if crew.parts == 1 else crew.device
    with journal.untouched():
        source = model if isinstance(model, Source) else open_source(model, staging=journal.source)
        outlined = rewritten(source, chosen, outline=True)
        laid = lay_out(outlined, chosen, where)
        shape, begun = _shape(source, chosen), None if fresh else journal.plan()
        most = max_memory or most_memory()
        batch, room, expected = fit(laid, chosen, shape, most, crew.parts, begun.get("batch") if begun else None)
        foreseen = Outlook(
            **vars(laid), source=outlined, recipe=chosen, out=out, batch=batch, room=room, estimate=expected,
            resumed=0 if begun is None else len(journal.entries()),
        )  # fmt: skip
        if announce is not None:
            announce(foreseen)
        check_room(out, expected.disk)
        tokens = read_tokens(source, chosen)
        identity = survey(source, laid.dtype)
        if chosen.generates:
            tokens = generated_tokens(source, chosen, laid.skeleton.model)
        if chosen.rewrites:
            source = rewritten(source, chosen)
            laid = lay_out(source, chosen, where)
        fingerprint = _fingerprint(identity, chosen, tokens, laid.wire, laid.dtype, where) | {
            "batch": batch,
            "compute_dtype": str(laid.skeleton.dtype),
            "parts": crew.parts,
        }
        if not fresh:
            check_begun(journal, fingerprint, out)
    return Plan(
        **vars(foreseen) | vars(laid) | {"source": source}, tokens=tokens, device=device, crew=crew, journal=journal,
        fingerprint=fingerprint, fresh=fresh,
    )  # fmt: skip


def with_calibration(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with these keys of its calibration, where they are not None.  Raises RecipeError for bad ones."""
    given = {key: value for key, value in changes.items() if value is not None}
    if not given:
        return recipe
    chosen = validate(Calibration, recipe.calibration.model_dump() | given, "the calibration")
    return recipe.model_copy(update={"calibration": chosen})


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


def _shape(source: Source, recipe: Recipe) -> Tensor | None:
    """The calibration tokens [samples, seq_len] as far as the recipe tells, without what is in them."""
    if not recipe.needs_calibration:
        return None
    c, limit = recipe.calibration, longest(source.config)
    if limit is not None and c.seq_len > limit:
        raise CalibrationError(
            f"calibration sequences of {c.seq_len} tokens are longer than the model's {limit}",
            f"use `--seq-len {limit}`",
        )
    return torch.empty(c.samples, c.seq_len, dtype=torch.int64, device="meta")


def generated_tokens(source: Source, recipe: Recipe, model: Any) -> Tensor:
    """The text that the model writes itself: it is in memory as a whole for that."""
    c, dense = recipe.calibration, type(model).from_pretrained(source.path, dtype=torch.float32)
    return self_generated(dense, samples=c.samples, seq_len=c.seq_len, seed=c.seed)


def read_tokens(source: Source, recipe: Recipe) -> Tensor | None:
    """The recipe's calibration text, None where there is none or the model writes it."""
    if not recipe.needs_calibration or recipe.generates:
        return None
    c = recipe.calibration
    if c.source == "random":
        return random_tokens(vocabulary(source.config), samples=c.samples, seq_len=c.seq_len, seed=c.seed)
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


def check_begun(journal: Journal, fingerprint: Mapping[str, Any], out: Path) -> None:
    """Raises CheckpointError where what was begun is another work."""
    begun = journal.plan()
    if begun is None:
        return
    if different := sorted(key for key in fingerprint if begun.get(key) != fingerprint[key]):
        raise CheckpointError(
            f"`{out}` holds an unfinished run with another {' and '.join(different)}",
            "finish it with the settings it was begun with, or start again with `--fresh`",
        )


def check_room(out: Path, needed: int) -> None:
    """Raises ResourceError where the disk of `out` has fewer bytes free."""
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"about {needed / 1e6:,.0f} MB of disk are needed for `{out}`, {free / 1e6:,.0f} MB are free",
            "free some space, or write to another disk",
        )

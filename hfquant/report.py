"""report.json: everything that is known about a compressed checkpoint, in one document beside it."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .errors import CheckpointError
from .tensors.shards import write_text

SCHEMA = 1
PATH = re.compile(r"/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")
FILE = "report.json"
SECTIONS = (
    "source",
    "recipe",
    "budget",
    "calibration",
    "wire",
    "layers",
    "compression",
    "adapter",
    "output",
    "evaluation",
    "sample",
    "bench",
    "gate",
    "figures",
)


def read(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint, an empty one if there is none yet.

    Raises CheckpointError if it is damaged or was written by a newer hfquant.
    """
    path = folder / FILE
    if not path.is_file():
        return {"schema": SCHEMA, "hfquant": __version__}
    try:
        report = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "remove it and compress again") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r}; this hfquant ({__version__}) reads schema {SCHEMA}",
            "upgrade hfquant, or remove the file and compress again",
        )
    return report


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Replace the report in one step: a crash leaves the old one or the new one, never half of one."""
    text = json.dumps(plain(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / FILE, text + "\n")


def merge(folder: Path, **sections: Any) -> dict[str, Any]:
    """Put sections (see SECTIONS) into a report, each replaced as a whole -> the new report."""
    if unknown := sections.keys() - set(SECTIONS):
        raise ValueError(f"no section {min(unknown)!r} in a report: there are {', '.join(SECTIONS)}")
    known = read(folder) | sections
    order = ("schema", "hfquant", *SECTIONS)
    report: dict[str, Any] = plain({name: known[name] for name in order if name in known})
    write(folder, report)
    return report


def public(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as it may leave this machine: of a path only its last part, whatever section it is in.

    What models and people wrote stays as it is: the sample, and the notes on layers.
    """
    written = ("sample", "notes", "description")
    return {key: value if key in written else _without_paths(value, written) for key, value in report.items()}


def _without_paths(value: Any, written: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: inner if key in written else _without_paths(inner, written) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner, written) for inner in value]
    if isinstance(value, str) and PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "a folder"
    return value


def plain(value: Any) -> Any:
    """As JSON has it: tuples become lists, paths text, and what is not a finite number null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value

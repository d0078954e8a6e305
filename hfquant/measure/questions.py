"""Files of questions with answers, and what lm-eval is told about them.

A file has a JSON object per line, of one of these kinds; the keys tell which:

    query, choices, gold                          which choice follows the query (ARC, and files of your own)
    goal, sol1, sol2                              PIQA; gold may be in a file NAME-labels.lst beside it, 0 or 1 a line
    ctx, endings, gold                            HellaSwag
    context_options, continuation, gold           Winogrande: after which beginning the continuation is likelier
    context, continuation                         LAMBADA: is the continuation what the model would have written

The prompts are lm-eval's own where its task has the same kind; files in another form give other numbers than its.
Those that come with hfquant are in its form; `data/LICENSES.md` says where they are from.
"""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibrationError

Row = Mapping[str, Any]
PACKAGED = Path(__file__).parent / "data"
ENDINGS = (".jsonl", ".jsonl.gz")
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [ACC, {**ACC, "metric": "acc_norm"}],
}
BEGINNING = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{gold}}",
    "doc_to_target": "{{continuation}}",
    "doc_to_choice": "{{context_options}}",
    "metric_list": [ACC],
}
FOLLOWS = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "metric_list": [ACC],
}


@dataclass(frozen=True)
class Kind:
    """keys: that every line has.  task: what lm-eval is told.  row: a line as that task reads it."""

    keys: frozenset[str]
    task: Mapping[str, Any]
    row: Callable[[Row], Row]


def _choice(text: Callable[[Row], str], choices: Callable[[Row], Sequence[str]]) -> Callable[[Row], Row]:
    return lambda row: {"query": text(row), "choices": list(choices(row)), "gold": int(row["gold"])}


def _apart(row: Row) -> str:
    """What follows a context, with the space between the two that lines leave out."""
    context, continuation = str(row["context"]), str(row["continuation"])
    together = context[-1:].isspace() or continuation[:1].isspace()
    return continuation if together else f" {continuation}"


KINDS = (
    Kind(
        frozenset({"goal", "sol1", "sol2"}),
        CHOICE,
        _choice(lambda r: f"Question: {r['goal']}\nAnswer:", lambda r: [r["sol1"], r["sol2"]]),
    ),
    Kind(frozenset({"ctx", "endings", "gold"}), CHOICE, _choice(lambda r: str(r["ctx"]), lambda r: r["endings"])),
    Kind(frozenset({"context_options", "continuation", "gold"}), BEGINNING, lambda r: r),
    Kind(frozenset({"context", "continuation"}), FOLLOWS, lambda r: {**r, "continuation": _apart(r)}),
    Kind(
        frozenset({"query", "choices", "gold"}),
        CHOICE,
        _choice(lambda r: f"{r['query']}\nAnswer:", lambda r: r["choices"]),
    ),
)


def packaged() -> dict[str, Path]:
    """The tasks that come with hfquant: name -> file."""
    return {_stem(path): path for path in sorted(PACKAGED.glob(f"*{ENDINGS[1]}"))}


def find_file(name: str, folder: Path) -> Path:
    """NAME.jsonl, or the only file NAME_*.jsonl; either may be compressed with gzip.

    Raises CalibrationError where there is none, or more than one.
    """
    for pattern in (f"{name}{{}}", f"{name}_*{{}}"):
        found = sorted(path for ending in ENDINGS for path in folder.glob(pattern.format(ending)))
        if len(found) == 1:
            return found[0]
        if found:
            break
    there = ", ".join(sorted(_stem(path) for ending in ENDINGS for path in folder.glob(f"*{ending}"))) or "none"
    which = "more than one file" if found else "no file"
    raise CalibrationError(f"`{folder}` has {which} for the task `{name}`", f"it has {there}")


def read(path: Path) -> tuple[Kind, list[Row]]:
    """The lines of a file, each as its kind of task reads it.  Raises CalibrationError for what is no such file."""
    try:
        rows = [json.loads(line) for line in _text(path).splitlines() if line.strip()]
        keys = set(rows[0])
        rows = _with_labels(path, rows)
        kind = next(kind for kind in KINDS if kind.keys <= keys)
        return kind, [kind.row(row) for row in rows]
    except StopIteration:
        hint = "each line needs `query`, `choices` and `gold`"
        raise CalibrationError(
            f"{path.name} is of no known kind: its lines have {', '.join(sorted(keys))}", hint
        ) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CalibrationError(
            f"{path.name} cannot be read as a task: {error!r}", "a JSON object per line, all with the same keys"
        ) from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(ENDINGS[1]).removesuffix(ENDINGS[0])


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")


def _with_labels(path: Path, rows: list[Row]) -> list[Row]:
    """With the answers from a file of their own, where there is one."""
    for ending in ("-labels.lst", "_labels.lst"):
        labels = path.with_name(_stem(path) + ending)
        if labels.is_file():
            found = labels.read_text("utf-8").split()
            if len(found) != len(rows):
                raise ValueError(f"{labels.name} has {len(found)} answers for {len(rows)} questions")
            return [{**row, "gold": int(gold)} for row, gold in zip(rows, found, strict=True)]
    return rows

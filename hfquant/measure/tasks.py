"""Questions with answers, scored by lm-eval: from its own list, or from local files, which need no network.

A file has a JSON object per line, of one of these kinds; the keys tell which:

    query, choices, gold                          which choice follows the query (ARC, and files of your own)
    goal, sol1, sol2                              PIQA; a file NAME-labels.lst beside it has the answers, 0 or 1 a line
    ctx, endings, gold                            HellaSwag
    context_options, continuation, gold           Winogrande: after which beginning the continuation is likelier
    context, continuation                         LAMBADA: is the continuation what the model would have written

The prompts are lm-eval's own where its task has the same kind; files in another form give other numbers than its.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError

Row = Mapping[str, Any]
METRICS = ("acc", "acc_norm", "exact_match", "f1")
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


@dataclass(frozen=True)
class Tasks:
    """What is to be asked.  names: of tasks.  files: name -> file; without any, the names are lm-eval's.
    limit: questions of each task, from its start."""

    names: tuple[str, ...]
    files: Mapping[str, Path]
    limit: int | None = None


def find(names: Sequence[str], folder: Path | None = None, limit: int | None = None) -> Tasks:
    """Check everything before any work.  Raises CalibrationError for a name without a file, a file that is of no kind,
    and where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise CalibrationError(
            f"tasks need lm-eval, which cannot be imported: {error}", "`pip install 'hfquant[eval]'`"
        ) from error
    files = {} if folder is None else {name: _file(name, folder) for name in names}
    for path in files.values():
        _read(path)
    return Tasks(tuple(names), files, limit)


def _file(name: str, folder: Path) -> Path:
    """NAME.jsonl, or the only file NAME_*.jsonl."""
    found = (
        [folder / f"{name}.jsonl"] if (folder / f"{name}.jsonl").is_file() else sorted(folder.glob(f"{name}_*.jsonl"))
    )
    if len(found) != 1:
        there = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl"))) or "none"
        which = "more than one file" if found else "no file"
        raise CalibrationError(f"`{folder}` has {which} for the task `{name}`", f"it has {there}")
    return found[0]


def _read(path: Path) -> tuple[Kind, list[Row]]:
    """The lines of a file, each as its kind of task reads it."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        keys = set(rows[0])
        rows = _with_labels(path, rows)
        kind = next(kind for kind in KINDS if kind.keys <= keys)
        return kind, [kind.row(row) for row in rows]
    except StopIteration:
        hint = "each line needs `query`, `choices` and `gold`"
        raise CalibrationError(
            f"{path.name} is of no known kind: its lines have {', '.join(sorted(keys))}", hint
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CalibrationError(
            f"{path.name} cannot be read as a task: {error!r}", "a JSON object per line, all with the same keys"
        ) from error


def _with_labels(path: Path, rows: list[Row]) -> list[Row]:
    """With the answers from a file of their own, where there is one."""
    for ending in ("-labels.lst", "_labels.lst"):
        labels = path.with_name(path.stem + ending)
        if labels.is_file():
            found = labels.read_text("utf-8").split()
            if len(found) != len(rows):
                raise ValueError(f"{labels.name} has {len(found)} answers for {len(rows)} questions")
            return [{**row, "gold": int(gold)} for row, gold in zip(rows, found, strict=True)]
    return rows


def run(tasks: Tasks, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Score a model -> name -> {"n", "source", and for each metric its value, and NAME_stderr}."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory(prefix="hfquant-") as folder, redirect_stdout(StringIO()):
        asked = [_task(name, tasks.files[name], Path(folder)) if name in tasks.files else name for name in tasks.names]
        done = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=asked,
            task_manager=TaskManager(include_defaults=not tasks.files),
            limit=tasks.limit,
            bootstrap_iters=100,
            log_samples=False,
        )
    assert done is not None
    return {name: _scores(name, tasks, done) for name in tasks.names}


def _task(name: str, path: Path, folder: Path) -> dict[str, Any]:
    """A local file as a task of lm-eval's."""
    kind, rows = _read(path)
    written = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(written)}, "cache_dir": str(folder / "cache")},
        "validation_split": "validation",
        "num_fewshot": 0,
        **kind.task,
    }


def _scores(name: str, tasks: Tasks, done: Mapping[str, Any]) -> dict[str, Any]:
    found = done["results"][name]
    known: dict[str, Any] = {"n": int(done["n-samples"][name]["effective"])}
    if name in tasks.files:
        path = tasks.files[name]
        known |= {"source": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    else:
        known["source"] = f"lm-eval {version('lm-eval')}"
    for metric in METRICS:
        if isinstance(value := found.get(f"{metric},none"), int | float):
            known[metric] = float(value)
            error = found.get(f"{metric}_stderr,none")
            known[f"{metric}_stderr"] = float(error) if isinstance(error, int | float) else None
    return known


def compared(after: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """For the report: task -> {"n", "source", "scores": {metric: {"value", "stderr", "original"}}}."""
    told: dict[str, Any] = {}
    for name, scores in after.items():
        metrics = {
            metric: {
                "value": scores[metric],
                "stderr": scores[f"{metric}_stderr"],
                "original": None if before is None else before[name].get(metric),
            }
            for metric in METRICS
            if metric in scores
        }
        told[name] = {key: scores[key] for key in ("n", "source", "sha256") if key in scores} | {"scores": metrics}
    return told

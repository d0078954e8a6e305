"""Questions with answers, scored by lm-eval: those that come with hfquant, those of local files, or its own.

Only its own need a network.  What a file may hold: `questions.py`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError
from .questions import find_file, packaged, read

THERE = "with hfquant come {}; `--task-files` asks those of a folder"
METRICS = ("acc", "acc_norm", "exact_match", "f1")


@dataclass(frozen=True)
class Tasks:
    """What is to be asked.  names: of tasks.  files: name -> file; the others are lm-eval's.
    limit: questions of each task, from its start."""

    names: tuple[str, ...]
    files: Mapping[str, Path]
    limit: int | None = None


def find(names: Sequence[str], folder: Path | None = None, limit: int | None = None, whole: bool = False) -> Tasks:
    """Check everything before any work.

    folder: where the files of all tasks are; without it, the questions that come with hfquant are asked if there are
    some of that name, else, and of all names if `whole`, lm-eval's, which it fetches from the Hub.

    Raises CalibrationError for a name without a file, a file that is of no kind, a name that lm-eval does not know or
    whose questions it cannot fetch, and where lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise CalibrationError(
            f"tasks need lm-eval, which cannot be imported: {error}", "`pip install 'hfquant[eval]'`"
        ) from error
    if not names:
        raise CalibrationError("no task is named", THERE.format(", ".join(packaged())))
    names = tuple(dict.fromkeys(names))
    if folder is not None:
        files = {name: find_file(name, folder) for name in names}
    else:
        files = {} if whole else {name: path for name, path in packaged().items() if name in names}
    for path in files.values():
        read(path)
    _fetch([name for name in names if name not in files])
    return Tasks(names, files, limit)


def _fetch(names: Sequence[str]) -> None:
    """Have lm-eval find its tasks and fetch their questions."""
    there = THERE.format(", ".join(packaged()))
    for name in names:
        known = _manager(True).all_subtasks
        if name not in known:
            close = get_close_matches(name, [*packaged(), *known], n=1)
            raise CalibrationError(f"lm-eval has no task `{name}`", f"did you mean `{close[0]}`?" if close else there)
        try:
            _manager(True).load([name])
        except (OSError, ValueError) as error:
            raise CalibrationError(f"lm-eval cannot fetch the questions of `{name}`: {error}", there) from error


@cache
def _manager(own: bool) -> Any:
    """lm-eval's list of tasks, its own among them or not: reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def check_lengths(tasks: Tasks, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> None:
    """Raises CalibrationError if an answer in a file has more tokens than the model can read, `longest`.

    Long questions lose their beginning; of an answer nothing may be missing.
    """
    for name, path in tasks.files.items() if longest else ():
        for number, row in enumerate(read(path)[1][: tasks.limit], 1):
            for answer in row.get("choices") or [row["continuation"]]:
                count = len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
                if longest and count > longest:
                    raise CalibrationError(
                        f"question {number} of `{name}` has an answer of {count} tokens; this model reads {longest}",
                        f"ask fewer with `--limit {number - 1}`" if number > 1 else "ask other tasks",
                    )


def run(tasks: Tasks, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Score a model -> name -> {"n", "source", and for each metric its value, and NAME_stderr}."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory(prefix="hfquant-") as folder, redirect_stdout(StringIO()):
        asked = [_task(name, tasks.files[name], Path(folder)) if name in tasks.files else name for name in tasks.names]
        done = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=asked,
            task_manager=_manager(any(name not in tasks.files for name in tasks.names)),
            limit=tasks.limit,
            bootstrap_iters=100,
            log_samples=False,
        )
    assert done is not None
    return {name: _scores(name, tasks, done) for name in tasks.names}


def _task(name: str, path: Path, folder: Path) -> dict[str, Any]:
    """A local file as a task of lm-eval's."""
    kind, rows = read(path)
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
        source = "a selection that comes with hfquant" if path == packaged().get(name) else path.name
        known |= {"source": source, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
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

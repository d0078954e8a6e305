"""What the user may say to transformers' Trainer: `KEY=VALUE` texts, checked before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import TrainingArguments

from ..errors import TrainingError
from ..recipe_source import read_yaml

# what recipe and command line say already: two places to say it would be one too many
OURS = {
    "learning_rate": "`--set quantgpt.lr=...`",
    "num_train_epochs": "`--set quantgpt.epochs=...`",
    "max_steps": "`--set quantgpt.epochs=...`, which may be a part of one",
    "per_device_train_batch_size": "`--set quantgpt.batch=...`",
    "per_device_eval_batch_size": "`hfquant eval`",
    "seed": "`--set quantgpt.seed=...`",
    "data_seed": "`--set quantgpt.seed=...`",
    "output_dir": "`--out`",
    "use_cpu": "`--device`",
    "save_steps": "`--save-every`",
    "save_strategy": "`--save-every`",
    "save_total_limit": "nothing: two checkpoints are kept",
    "resume_from_checkpoint": "`--resume`",
    "remove_unused_columns": "nothing",
    "label_names": "nothing",
    "do_train": "nothing",
    "save_only_model": "nothing: without the optimizer nothing can go on",
    "push_to_hub": "`hfquant push`",
}
# what changes no number: a run may go on with others
SILENT = ("logging", "report_to", "run_name", "disable_tqdm", "log_level", "project", "dataloader_num_workers")


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Texts -> arguments by name.  Raises TrainingError for one that does not exist, or that is said elsewhere."""
    known = {field.name: field for field in fields(TrainingArguments) if field.init}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            raise TrainingError(
                f"cannot read `{text}` as an option of the Trainer", "write KEY=VALUE, e.g. `bf16=true`"
            )
        if name in OURS:
            raise TrainingError(f"`{name}` is not said here", f"use {OURS[name]}")
        if name not in known:
            close = get_close_matches(name, set(known) - set(OURS), n=1)
            hint = f"did you mean `{close[0]}`?" if close else "see transformers' TrainingArguments"
            raise TrainingError(f"transformers' Trainer has no option `{name}`", hint)
        found[name] = read_yaml(value, f"the value of `{name}`")
    steps = found.get("gradient_accumulation_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise TrainingError(f"`gradient_accumulation_steps` is `{steps}`", "give a whole number from 1 on")
    return found


def decide(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the result."""
    return {name: value for name, value in sorted(options.items()) if not name.startswith(SILENT)}

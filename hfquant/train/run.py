"""A training, from a dense model to a checkpoint that is whole."""

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from ..compress.plan import clear
from ..compress.rounding import Reading
from ..errors import TrainingError
from ..machine import hardware, peak_memory, versions
from ..report import merge
from ..tensors import formats
from .contrastive import Projection
from .data import arguments, collate
from .modules import learning, round_inputs
from .plan import Training
from .scaling import Scaling
from .trainer import DistillationTrainer
from .write import results, write

SEEN = 8  # batches that inputs are looked at on, where that decides how they are rounded
Told = Callable[[Mapping[str, float]], None]


def train(plan: Training, told: Told | None = None) -> dict[str, Any] | None:
    """Train, and write `plan.out` -> its report; None in all processes but the first.

    told: called with what the Trainer logs.  Killed at any moment, the same call goes on from the last checkpoint, and
    on a CPU ends in the same bytes.
    """
    begun = time.perf_counter()
    trainer = begin(plan, told)
    done = trainer.train(resume_from_checkpoint=None if plan.resume is None else str(plan.resume))
    if not trainer.is_world_process_zero():
        return None
    student: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model).eval()
    files, wire = write(student, plan)
    source = plan.source
    report = merge(
        plan.out,
        source={
            "id": source.id, "revision": source.revision, "bytes": source.total_bytes,
            "parameters": source.parameters, "dtype": str(source.dtype).removeprefix("torch."),
        },
        recipe=plan.recipe.model_dump(mode="json"),
        calibration={
            "source": plan.text, "samples": len(plan.sequences), "seq_len": plan.method.seq_len,
            "seed": plan.method.seed, "sha256": plan.sha256,
        },
        wire={"format": wire.format, "config": formats.load(wire.format).config(wire)},
        layers=[asdict(row) for row in results(student, trainer.teacher, plan, wire)],
        compression={
            "seconds": time.perf_counter() - begun, "peak_memory_bytes": peak_memory(), "hardware": hardware(),
            "versions": versions(), "resumed": _step(plan),
            "compute_dtype": "bfloat16" if trainer.args.bf16 else "float32",
            "training": {"steps": done.global_step, "loss": done.training_loss, "options": dict(plan.options)},
        },
        output={
            "bytes": sum((plan.out / f).stat().st_size for f in files if f.endswith(".safetensors")), "files": files,
        },
    )  # fmt: skip
    shutil.rmtree(plan.checkpoints, ignore_errors=True)
    plan.journal.remove()
    return report


def begin(plan: Training, told: Told | None = None) -> DistillationTrainer:
    """Teacher and student in memory, and the Trainer that will bring them together."""
    if plan.first:
        plan.out.mkdir(parents=True, exist_ok=True)
        if plan.fresh:
            clear(plan.out, plan.journal)
            shutil.rmtree(plan.checkpoints, ignore_errors=True)
        plan.journal.begin(plan.fingerprint)
    settings = _settings(plan)
    torch.manual_seed(plan.method.seed)
    teacher, student = _load(plan, dropout=True), _load(plan, dropout=plan.method.dropout)
    prepare(student, plan)
    trainer = DistillationTrainer(
        student, teacher=teacher, method=plan.method, args=settings, train_dataset=plan.sequences,
        data_collator=partial(collate, pad=_pad(plan)), callbacks=[] if told is None else [_Tell(told)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints what is logged to stdout, which is for data
    return trainer


def prepare(student: PreTrainedModel, plan: Training) -> None:
    """Put the student on its grids, have it round its inputs, and give it what representations are compared with."""
    method = plan.method
    scalings = {
        name: Scaling(
            _matrix(student.get_parameter(name), target.kind), target.grid, method.quantizer, method.start,
            plan.wire.scale_dtype, whole=method.per == "matrix" and target.kind not in ("embedding", "head"),
        )
        for name, target in plan.targets.items()
    }  # fmt: skip
    learning(student, plan.targets, scalings)
    round_inputs(student, plan.targets, Reading.of(plan.recipe.activations), _first(student, plan))
    if method.contrast:
        hidden = student.config.get_text_config(decoder=True).hidden_size
        Projection.put(student, hidden, method.projection or hidden, method.seed)


def _matrix(parameter: nn.Parameter, kind: str) -> Tensor:
    return parameter.detach().T if kind == "conv1d" else parameter.detach()


def _first(student: PreTrainedModel, plan: Training) -> Iterator[dict[str, Any]]:
    rows = [plan.sequences[i] for i in range(min(SEEN * plan.batch, len(plan.sequences)))]
    for at in range(0, len(rows), plan.batch):
        yield arguments(student, collate(rows[at : at + plan.batch], _pad(plan)))


def _load(plan: Training, *, dropout: bool) -> PreTrainedModel:
    """The original in float32: what learns needs it.  Without dropout, unless it is wanted."""
    config = copy.deepcopy(plan.source.config)
    if not dropout:
        _without_dropout(config)
    loaded: PreTrainedModel = type(plan.skeleton.model).from_pretrained(
        plan.source.path, config=config, dtype=torch.float32
    )
    return loaded.eval()


def _without_dropout(config: PretrainedConfig) -> None:
    """No part of the network is left out at random, whatever its configuration calls that."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _without_dropout(value)
        elif isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)


def _settings(plan: Training) -> TrainingArguments:
    given = {"report_to": [], "logging_steps": 10, "disable_tqdm": True, "ddp_find_unused_parameters": False}
    given |= plan.options
    try:
        found = TrainingArguments(
            output_dir=str(plan.checkpoints), learning_rate=plan.method.lr, num_train_epochs=plan.method.epochs,
            per_device_train_batch_size=plan.batch, seed=plan.method.seed, data_seed=plan.method.seed,
            save_strategy="steps", save_steps=plan.save_every, save_total_limit=2, remove_unused_columns=False,
            label_names=["labels"], use_cpu=torch.device(plan.device).type == "cpu", **given,
        )  # fmt: skip
    except (ValueError, TypeError, ImportError) as error:
        raise TrainingError(
            f"the Trainer refuses its options: {str(error).splitlines()[0]}", "look at what `--trainer` says"
        ) from error
    if found.n_gpu > 1:  # the Trainer would copy the model to all of them; several processes do that better
        found._n_gpu = 1
    return found


def _pad(plan: Training) -> int:
    return int(plan.source.config.get_text_config(decoder=True).pad_token_id or 0)


def _step(plan: Training) -> int:
    """The step that it went on from."""
    return 0 if plan.resume is None else int(plan.resume.name.rpartition("-")[2])


class _Tell(TrainerCallback):  # type: ignore[misc]
    def __init__(self, told: Told) -> None:
        self.told = told

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.told({"step": state.global_step, "steps": state.max_steps, **logs})

"""transformers' Trainer with a teacher: what the student learns from, and what its checkpoints hold besides."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..errors import TrainingError
from ..methods.quantgpt import Method
from .contrastive import Bank, Projection, contrastive, last, soft_cross_entropy, token_scale
from .data import IGNORED, arguments
from .modules import learners

BANK = "bank-{rank}.safetensors"


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains a student that computes on its grids to match a teacher.

    The student has a `Projection` where the method asks for contrast.
    """

    def __init__(self, model: PreTrainedModel, *, teacher: PreTrainedModel, method: Method, **kwargs: Any) -> None:
        self.teacher, self.method = teacher.eval().requires_grad_(False), method
        self.bank = Bank(method.momentum)
        self._terms: dict[str, list[float]] = {}
        super().__init__(model, **kwargs)
        self.teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the loss here is a mean over each batch
        if method.quantizer == "laq":
            self.add_callback(Solve())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, labels, given = inputs["sequence"], inputs["labels"], arguments(self.teacher, inputs)
        hidden = self.method.contrast > 0
        with torch.no_grad():
            teacher = self.teacher(**given, output_hidden_states=hidden)
        if hidden:
            getattr(self.accelerator.unwrap_model(self.model), Projection.NAME).teacher = last(teacher)
        student = model(**given, output_hidden_states=hidden)
        mask = labels != IGNORED
        terms = {}
        after, known = (labels, mask) if self._pairs else _next(labels, mask)
        weight = mask.float()
        if self.method.token_scaled:
            weight = token_scale(teacher.logits, after, known)
        if self.method.logits:
            terms["logits"] = self.method.logits * soft_cross_entropy(student["logits"], teacher.logits, weight)
        if hidden:
            terms["contrast"] = self.method.contrast * self._contrast(ids, student[Projection.KEY], mask)
        if self.method.truth:
            lost = cross_entropy(student["logits"].float().flatten(0, 1), after.flatten(), ignore_index=IGNORED)
            terms["truth"] = self.method.truth * lost
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(float(term.detach()))
        loss = cast(Tensor, sum(terms.values()))
        return (loss, student) if return_outputs else loss

    @property
    def _pairs(self) -> bool:
        return bool(self.teacher.config.is_encoder_decoder)

    def _contrast(self, ids: Tensor, projected: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, t = (normalize(h.float(), dim=-1) for h in projected)
        smooth = self.bank.smooth(ids, q, mask) if self.model.training else q
        return contrastive(smooth, t, mask, self.method.temperature, self.method.negatives)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """What the clipping is made of has a learning rate of its own; nothing decays but what the arguments say."""
        made: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if made is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            gains = [p for n, p in named if n.endswith("scaling.gain")]
            weights = [p for n, p in named if not n.endswith("scaling.gain")]
            groups = [{"params": weights, "weight_decay": self.args.weight_decay}]
            if gains:
                groups.append({"params": gains, "weight_decay": 0.0, "lr": self.method.scale_lr})
            made = self.optimizer = cls(groups, **options)
        return cast(torch.optim.Optimizer, made)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the terms of the loss, means since the last time."""
        means = {f"loss_{name}": sum(values) / len(values) for name, values in self._terms.items()}
        self._terms.clear()
        super().log(logs | (means if "loss" in logs else {}), start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.bank.save(folder / BANK.format(rank=self.args.process_index))  # last: its presence says that all is there

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.bank.load(Path(resume_from_checkpoint) / BANK.format(rank=self.args.process_index))


class Solve(TrainerCallback):  # type: ignore[misc]
    """laq: after every step the clipping is the one that its loss asks for, by Adam's second moments."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moments, beta = kwargs["optimizer"].state, args.adam_beta2
        for _, layer in learners(kwargs["model"]):
            if layer.borrowed or layer.own.kind != "laq":
                continue
            W = cast(nn.Parameter, layer.weight)
            if "exp_avg_sq" not in moments.get(W, {}):
                raise TrainingError(
                    "`quantizer: laq` needs Adam's second moments of each weight as a whole",
                    "train on one device or without ZeRO, with `optim=adamw_torch`",
                )
            second = moments[W]["exp_avg_sq"] / (1 - beta ** float(moments[W]["step"]))
            layer.own.solve(layer.matrix, second.T if isinstance(layer, Conv1D) else second)


def last_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint that was written in full, by all processes."""
    banks = [BANK.format(rank=rank) for rank in range(processes)]
    found = [c for c in folder.glob("checkpoint-*") if all((c / bank).is_file() for bank in banks)]
    return max(found, key=lambda c: int(c.name.rpartition("-")[2]), default=None)


def _next(labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a model that continues its input: the token that comes after each, and where there is one."""
    after = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    return after, (after != IGNORED) & mask

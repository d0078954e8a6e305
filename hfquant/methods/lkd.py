"""LKD, layer-by-layer knowledge distillation (ZeroQuant; Yao et al., 2022; arXiv:2206.01861, section 4.3).

When all weights of a block are compressed, the block learns to put out what the original one did:

    min  mean over tokens of ‖f̂(x) − f(x̃)‖² / ‖f(x̃)‖²

f is the original block behind the original blocks before it, f̂ the compressed one, with its inputs rounded as they will
be, behind the compressed ones.  One block is in memory at a time, and any text will do, even none: random tokens.

Beside the paper: it starts from what any other method left, not from rounding to nearest; x is what the compressed
blocks before it put out (`input: teacher`: x̃, as in the paper), so that it makes up for what they lost; what is learned
are the roundings of all weights (as in AutoRound; Cheng et al., 2023; arXiv:2309.05516), the groups' scales, gains and
biases; tokens count by their relative error, since a few have a hundred times the size of the others; of all steps the
one that is best on held-out text is kept.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..model.blocks import Weight
from ._learned import Learned, learned

if TYPE_CHECKING:
    from ..compress.student import Student

# Adam without its first moment: a step of the past knows nothing of the codes that changed since, and with momentum
# codes swing across their boundary.  With 0.9 less is recovered, with 0.95 less still
BETAS = (0.0, 0.99)
CHECKS = 4  # how often in its course a block is judged on the held-out text


class Method(BaseModel):
    """Options of LKD."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "finished"
    kind: ClassVar[str] = "distill"
    needs_hessian: ClassVar[bool] = True
    needs_original: ClassVar[bool] = True

    steps: int | None = Field(
        None, ge=1, description="of the optimizer, for each block; null: 40, and 80 where weights have less than 4 bit"
    )
    tokens: int = Field(2048, ge=1, description="that a step learns from")
    rounding: float = Field(
        0.01, ge=0, lt=0.5, description="learning rate of the codes, in steps of the grid; 0: they stay as they are"
    )
    scales: float = Field(2e-3, ge=0, lt=0.5, description="learning rate of the scales, relative; 0: they stay")
    vectors: float = Field(2e-3, ge=0, description="learning rate of gains and biases, relative; 0: they stay")
    optimizer: Literal["adam", "sign"] = Field("adam", description="`sign`: as AutoRound does, by the gradient's sign")
    input: Literal["student", "teacher"] = Field(
        "student", description="what the block reads: what the compressed blocks before it put out, or the original's"
    )
    seed: int = Field(0, ge=0, description="chooses the order of the text")

    @model_validator(mode="after")
    def _something_is_learned(self) -> "Method":
        if not (self.rounding or self.scales or self.vectors):
            raise ValueError("nothing is learned: one of `rounding`, `scales` and `vectors` has to be above 0")
        return self

    def count(self, bits: int) -> int:
        """Steps for a block whose narrowest weights have so many bits: where more is lost, more can be won."""
        return self.steps or (80 if bits < 4 else 40)

    def __call__(self, student: "Student") -> None:
        """Train a block, in place."""
        lesson = _Lesson(self, student)
        before = best = lesson.judge()
        kept: tuple[dict[Weight, Any], dict[str, Tensor]] | None = None
        steps = self.count(min(Q.grid.bits for Q in student.weights.values()))
        step, every = 0, max(1, steps // CHECKS)
        for i in range(steps):
            lesson.learn((1 + math.cos(math.pi * i / steps)) / 2)  # most codes settle while the rates are low
            if (i + 1) % every and i + 1 < steps:
                continue
            if (error := lesson.judge()) < best:
                best, step, kept = error, i + 1, lesson.state()
        if kept is not None:
            student.finish(*kept)
        student.rows.append(
            {
                "step": "lkd",
                "layers": [weight.module for weight in student.weights],
                "error_before": before**0.5,
                "error": best**0.5,
                "best_step": step,
            }
        )


class _Lesson:
    """One block in training."""

    def __init__(self, method: Method, student: "Student") -> None:
        self.method, self.student = method, student
        self.weights: dict[Weight, Learned] = {w: learned(Q, student.original(w)) for w, Q in student.weights.items()}
        self.vectors = student.vectors() if method.vectors else {}
        # learned in units of their own size: one rate fits a gain around 1 and a bias around 0.01
        self._units = {name: v.square().mean().sqrt().clamp(min=1e-6) for name, v in self.vectors.items()}
        self._shifts = {name: torch.zeros_like(v) for name, v in self.vectors.items()}
        groups = [
            {"params": [t.requires_grad_() for t in tensors], "rate": rate, "lr": rate}
            for tensors, rate in (
                ([weight.latent for weight in self.weights.values()], method.rounding),
                ([weight.scale for weight in self.weights.values()], method.scales),
                (list(self._shifts.values()), method.vectors),
            )
            if rate and tensors
        ]
        self._optimizer = (
            Sign(groups) if method.optimizer == "sign" else torch.optim.Adam(groups, betas=BETAS, eps=1e-12, fused=True)
        )
        self._order = self._shuffled()

    def _shuffled(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.method.seed + self.student.index)
        while True:
            for i in torch.randperm(len(self.student.train), generator=generator).tolist():
                yield self.student.train[i]

    def _gains(self) -> dict[str, Tensor]:
        return {name: v + self._units[name] * self._shifts[name] for name, v in self.vectors.items()}

    def _loss(self, batch: int, weights: Mapping[Weight, Tensor]) -> Tensor:
        """Mean over tokens of the squared relative error."""
        output = self.student.output(batch, weights, self._gains(), teacher=self.method.input == "teacher")
        loss: Tensor = RelativeError.apply(output, self.student.target(batch))
        return loss

    def _weights(self) -> dict[Weight, Tensor]:
        return {w: weight.weight(self.student.dtype(w)) for w, weight in self.weights.items()}

    def learn(self, rate: float) -> None:
        """One step, at a share `rate` of the learning rates."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        self._optimizer.zero_grad()
        tokens = 0
        while tokens < self.method.tokens:
            batch = next(self._order)
            n = self.student.tokens(batch)
            with torch.enable_grad():
                loss = self._loss(batch, self._weights())
                (loss * (n / self.method.tokens)).backward()
            tokens += n
        self._optimizer.step()

    def judge(self) -> float:
        """The loss on the held-out batches; infinite if it is not a number."""
        with torch.no_grad():
            weights = self._weights()
            losses = [float(self._loss(batch, weights)) for batch in self.student.held]
        mean = sum(losses) / len(losses)
        return mean if mean == mean else float("inf")

    def state(self) -> tuple[dict[Weight, Any], dict[str, Tensor]]:
        """What would be stored, as it is now."""
        return {w: weight.quantized() for w, weight in self.weights.items()}, {
            name: v.detach() for name, v in self._gains().items()
        }


class RelativeError(torch.autograd.Function):
    """(y, t) -> mean over tokens of ‖y − t‖² / ‖t‖².  y [..., hidden] of any type, t float32; the gradient is y's.

    ∂/∂y = 2 (y − t) / (n ‖t‖²), n tokens.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        d = y.float() - t
        energy = torch.linalg.vector_norm(t, dim=-1).square_().clamp_(min=1e-12)
        ctx.save_for_backward(d, energy)
        ctx.dtype = y.dtype
        return (torch.linalg.vector_norm(d, dim=-1).square_() / energy).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d, energy = ctx.saved_tensors
        return (d * (2 * grad / (energy.numel() * energy))[..., None]).to(ctx.dtype), None


class Sign(torch.optim.Optimizer):
    """Every parameter moves by its rate, against the sign of its gradient."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])

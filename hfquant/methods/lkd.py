"""Layer-by-layer knowledge distillation (ZeroQuant; Yao et al., 2022; arXiv:2206.01861, section 4.3)."""

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ._learned import Learned

if TYPE_CHECKING:
    from ..compress.student import Student


class Method(BaseModel):
    """Options of LKD."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "finished"
    kind: ClassVar[str] = "distill"
    needs_hessian: ClassVar[bool] = True
    needs_original: ClassVar[bool] = True

    steps: int = Field(40, ge=1, description="x")
    tokens: int = Field(2048, ge=1, description="x")
    lr_u: float = Field(0.02, description="x")
    lr_s: float = Field(2e-3, description="x")
    lr_n: float = Field(2e-3, description="x")
    optimizer: str = Field("adam", description="x")
    beta2: float = Field(0.95, description="x")
    beta1: float = Field(0.9, description="x")
    loss: str = Field("token", description="x")
    match_original: float = Field(0.5, description="x")
    input: str = Field("student", description="x")
    seed: int = 0
    check: int = 5
    best: bool = True
    warm: float = 0.0

    def __call__(self, student: "Student") -> None:
        weights = {w: Learned(Q, student.master(w)) for w, Q in student.weights.items()}
        vectors = {n: v.clone() for n, v in student.vectors().items()} if self.lr_n else {}
        groups = []
        for tensors, lr in (
            ([l.latent for l in weights.values()], self.lr_u),
            ([l.scale for l in weights.values()], self.lr_s),
            (list(vectors.values()), self.lr_n),
        ):
            for t in tensors:
                t.requires_grad_(lr > 0)
            if lr > 0:
                groups.append({"params": tensors, "lr": lr, "base": lr})
        opt: Any = torch.optim.Adam(groups, betas=(self.beta1, self.beta2), eps=1e-12) if self.optimizer == "adam" else Sign(groups)
        target = student.target(self.match_original)

        def values():
            return {w: l.weight() for w, l in weights.items()}

        def loss(batch):
            y = student.output(batch, values(), vectors, teacher_stream=self.input == "teacher")
            t = target(batch)
            d = (y.float() - t)
            if self.loss == "token":
                return (d.square().sum(-1) / t.square().sum(-1)).mean()
            if self.loss == "plain":
                return d.square().sum() / student.energy
            raise ValueError

        def held():
            with torch.no_grad():
                return sum(float(loss(b)) for b in student.held) / len(student.held)

        before = best = held()
        trace=[best]
        keep = None
        gen = torch.Generator().manual_seed(self.seed + student.index)
        order: list[int] = []
        for k in range(self.steps):
            sched = (1 - k / self.steps)
            for g in opt.param_groups:
                g["lr"] = g["base"] * sched
            opt.zero_grad()
            seen = 0
            while seen < self.tokens:
                if not order:
                    order = [student.train[j] for j in torch.randperm(len(student.train), generator=gen).tolist()]
                b = order.pop()
                with torch.enable_grad():
                    l = loss(b)
                l.backward()
                seen += student.tokens(b)
            opt.step()
            if (k + 1) % self.check == 0 or k + 1 == self.steps:
                e = held()
                trace.append(e)
                if e < best or not self.best:
                    best = e
                    keep = [l.quantized() for l in weights.values()], {n: v.detach().clone() for n, v in vectors.items()}
        found = {"error_before": before ** 0.5, "error": best ** 0.5, "trace":[round(x**.5,5) for x in trace]}
        if keep is not None:
            for w, Q in zip(weights, keep[0], strict=True):
                student.put(w, Q)
            for n, v in keep[1].items():
                student.change(n, v)
        student.report(**found)


class Sign(torch.optim.Optimizer):
    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                p.add_(p.grad.sign(), alpha=-g["lr"])

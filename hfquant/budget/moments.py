"""How much every residual of a weight moves the model's predictions, summed on the way back.

An error ΔW of a layer's weight changes the log-probability of the tokens drawn for one sequence by ⟨ΔW, G⟩, where
G = Σₜ gₜxₜᵀ, with g the gradients at the layer's output.  If ΔW = E M, with residuals E that are independent of each
other,

    KL = ½ E⟨ΔW, G⟩² = ½ Σᵢⱼ Eᵢⱼ² Fᵢⱼ      F = Σ over sequences of (G Mᵀ)², per token

For rounding to nearest E is what was rounded away, and M = 1.  GPTQ carries residuals on, to the columns that are not
rounded yet: ΔW = E U with Eᵢⱼ = rᵢⱼ / Uⱼⱼ, H⁻¹ = UᵀU, so M = diag(U)⁻¹U.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..machine import multiplies_bfloat16
from ..model.blocks import Weight
from ..runtime.gram import add_gram

ROWS = 256  # of a weight that are looked at


@dataclass
class Sums:
    """Of one weight [out, in], all experts' rows one after the other.

    rows int64 [n]: those that are looked at.  F float32 [n, in].  b float32 [out]: Σ g² of every row.  places:
    how many tokens were drawn.
    """

    rows: Tensor
    F: Tensor
    b: Tensor
    places: int

    def loss(self, r: Tensor) -> float:
        """KL, nats per token, that residuals r [n, in] of the rows cost, all rows counted."""
        seen, total = float(self.b[self.rows].sum()), float(self.b.sum())
        found = 0.5 * float((r.square() * self.F).sum()) / max(1, self.places)
        return found * (total / seen if seen > 0 else 1.0)


def sampled(rows: int) -> Tensor:
    """Which rows of so many are looked at."""
    return torch.arange(0, rows, max(1, rows // ROWS))


def expert_parts(module: Any, call: tuple[Any, Any]) -> Iterator[Any]:
    """For every expert that tokens reach: its number, the tokens, their shares, and its first and second matrix."""
    args, kwargs = call
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    x = given["hidden_states"].detach().reshape(-1, given["hidden_states"].shape[-1])
    index = given["top_k_index"].reshape(len(x), -1)
    share = given["top_k_weights"].detach().reshape(len(x), -1)
    first = module.gate_up_proj if module.has_gate else module.up_proj
    for expert in range(first.shape[0]):
        token, place = torch.where(index == expert)
        if len(token):
            second = module.down_proj[expert].detach()
            yield expert, token, share[token, place], x[token], first[expert].detach(), second


@dataclass
class Inputs:
    """Σ xxᵀ of what a block's weights read; experts of one tensor together.  Gathered running forward.

    learning: asked at every call whether it counts.
    """

    block: nn.Module
    wanted: Sequence[Weight]
    learning: Callable[[], bool] = lambda: True
    leaders: dict[Weight, str] = field(default_factory=dict)  # -> the first weight that reads the same
    H: dict[str, Tensor] = field(default_factory=dict)  # by leader, below the diagonal
    _alive: list[tuple[Tensor, str]] = field(default_factory=list)  # inputs of the first batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for module, own in by_module(self.wanted).items():
                hook = self._experts(own) if own[0].kind == "experts" else self._ordinary(own[0])
                handle = self.block.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            yield
        self._alive.clear()

    def _ordinary(self, weight: Weight) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.learning():
                return
            x = args[0] if args else next(iter(kwargs.values()))
            if weight not in self.leaders:
                self.leaders[weight] = next((name for kept, name in self._alive if kept is x), weight.name)
                self._alive.append((x, self.leaders[weight]))
            if self.leaders[weight] == weight.name:
                self._add(weight.name, x.detach().reshape(-1, x.shape[-1]))

        return hook

    def _experts(self, own: Sequence[Weight]) -> Any:
        by_leaf = {weight.name.rpartition(".")[2]: weight for weight in own}

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.learning():
                return
            for _, _, _, x, first, _ in expert_parts(module, (args, kwargs)):
                for leaf, weight in by_leaf.items():
                    self.leaders[weight] = weight.name
                    self._add(weight.name, acted(module, linear(x, first)) if leaf == "down_proj" else x)

        return hook

    def _add(self, leader: str, x: Tensor) -> None:
        if leader not in self.H:
            self.H[leader] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_gram(self.H[leader], x)


def acted(module: Any, inner: Tensor) -> Tensor:
    """What an expert's second matrix reads."""
    found: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return found


def _summable(t: Tensor) -> Tensor:
    """What products for F are of: bfloat16 as it is where the hardware multiplies it faster, else float32.

    It holds small gradients, as float16 does not, and losses come out the same within 0.5%.
    """
    as_it_is = t.dtype == torch.bfloat16 and (t.device.type != "cpu" or multiplies_bfloat16())
    return t if as_it_is else t.float()


def by_module(wanted: Sequence[Weight]) -> dict[str, list[Weight]]:
    found: dict[str, list[Weight]] = {}
    for weight in wanted:
        found.setdefault(weight.module, []).append(weight)
    return found


@dataclass
class Gradients:
    """`Sums` of a block's weights, gathered while it runs and is taken back.

    spread: M [in, in] of each weight, None for 1.  places: how many tokens are drawn in all.
    """

    block: nn.Module
    wanted: Sequence[Weight]
    spread: Mapping[Weight, Tensor | None]
    places: int
    sums: dict[Weight, Sums] = field(default_factory=dict)
    samples: int = 1
    _converted: dict[tuple[int, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def begin(self, samples: int) -> None:
        """The next batch has so many sequences."""
        self.samples = samples

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for module, own in by_module(self.wanted).items():
                hook = self._experts(own) if own[0].kind == "experts" else self._ordinary(own[0])
                handle = self.block.get_submodule(module).register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def _ordinary(self, weight: Weight) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                output.register_hook(lambda g: self._add(weight, x, g))

        return hook

    def _add(self, weight: Weight, x: Tensor, g: Tensor) -> None:
        # tokens that a router picked are of one list: taken for one sequence, as products of two cancel in the mean
        apart = self.samples if x.dim() > 2 and len(x) == self.samples else 1
        x, g = (_summable(t.detach()).reshape(apart, -1, t.shape[-1]) for t in (x, g))
        mine = self._of(weight, g.shape[-1], x.shape[-1])
        mine.b += g.float().square().sum((0, 1)).cpu()
        G = torch.bmm(g[..., mine.rows.to(g.device)].transpose(1, 2), x.to(g.dtype))
        self._square(weight, mine, slice(None), G)

    def _of(self, weight: Weight, out: int, in_features: int) -> Sums:
        if weight not in self.sums:
            rows = sampled(out)
            self.sums[weight] = Sums(rows, torch.zeros(len(rows), in_features), torch.zeros(out), self.places)
        return self.sums[weight]

    def _square(self, weight: Weight, mine: Sums, at: slice, G: Tensor) -> None:
        """G [sequences, rows, in]"""
        M = self._carrying(weight, G)
        mine.F[at] += (G if M is None else G @ M.T).float().square().sum(0).cpu()

    def _carrying(self, weight: Weight, G: Tensor) -> Tensor | None:
        """M of a weight, as G is: converted once for all batches, and for all weights that read the same."""
        M = self.spread.get(weight)
        if M is None or (M.dtype, M.device) == (G.dtype, G.device):
            return M
        key = id(M), G.dtype, G.device
        if key not in self._converted:
            self._converted[key] = M.to(G.device, G.dtype)
        return self._converted[key]

    def _experts(self, own: Sequence[Weight]) -> Any:
        by_leaf = {weight.name.rpartition(".")[2]: weight for weight in own}

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda g: self._add_experts(module, by_leaf, (args, kwargs), g))

        return hook

    def _add_experts(self, module: Any, own: Mapping[str, Weight], call: tuple[Any, Any], g: Tensor) -> None:
        """Their inside is run again, as nothing of it can be hooked."""
        g = g.detach().reshape(-1, g.shape[-1])
        for expert, token, share, x, first, second in expert_parts(module, call):
            back = g[token] * share[:, None].to(g.dtype)
            with torch.enable_grad():
                inner = linear(x, first).requires_grad_()
                read = acted(module, inner)
                linear(read, second).backward(back)
            assert inner.grad is not None
            sequence = token // (len(g) // self.samples)
            for leaf, weight in own.items():
                down = leaf == "down_proj"
                seen, come = (read.detach(), back) if down else (x, inner.grad)
                self._add_expert(module, weight, expert, _summable(seen), _summable(come), sequence)

    def _add_expert(self, module: Any, weight: Weight, expert: int, x: Tensor, g: Tensor, sequence: Tensor) -> None:
        out, experts = g.shape[1], module.down_proj.shape[0]
        mine = self._of(weight, out * experts, x.shape[1])
        begin = expert * out
        mine.b[begin : begin + out] += g.float().square().sum(0).cpu()
        at = torch.where((mine.rows >= begin) & (mine.rows < begin + out))[0]
        if not len(at):
            return
        own = (mine.rows[at] - begin).to(g.device)
        for one in sequence.unique().tolist():
            some = sequence == one
            G = g[some][:, own].T @ x[some].to(g.dtype)
            self._square(weight, mine, slice(int(at[0]), int(at[-1]) + 1), G[None])

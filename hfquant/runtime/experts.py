"""Fused experts: 3-D parameters [experts, out, in], every matrix of them packed like a linear layer's weight.

The module keeps its class in front of which a mixin is put, so that its own gate and activation run.
transformers marks such classes with the flags that `use_experts_implementation` sets; no class is named here.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..tensors.encoding import Encoding
from ..tensors.formats import Format, Spec
from ..tensors.grid import Grid
from ..tensors.layer import Quantized
from . import cache, ops  # noqa: F401  (ops registers torch.ops.hfquant)
from .declare import declare, keep_dtype
from .reference import Matrix, dense

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts, compressed or not."""
    if isinstance(module, QExperts):
        return True
    return all(hasattr(module, flag) for flag in FLAGS) and bool(matrices(module))


def matrices(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The 3-D parameters of a dense experts module: name -> (experts, out, in)."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return cast(dict[str, tuple[int, int, int]], shapes)


def refuses(module: nn.Module) -> str | None:
    """Why these experts must stay dense; None if they can be packed."""
    if module.is_transposed:
        return "its matrices are stored transposed"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises after every expert"
    return None


def component_name(param: str, component: str) -> str:
    """A format's component -> the module's parameter: (gate_up_proj, weight_scale) -> gate_up_proj_scale."""
    return param + component.removeprefix("weight")


def specs(param: str, shape: tuple[int, int, int], encoding: Encoding, fmt: Format, scale_dtype: torch.dtype) -> Spec:
    """Parameter name -> (shape, dtype) for what one 3-D parameter becomes."""
    experts, *matrix = shape
    return {
        component_name(param, name): ((experts, *size), dtype)
        for name, (size, dtype) in fmt.spec(encoding, (matrix[0], matrix[1]), scale_dtype).items()
    }


class QExperts(nn.Module):
    """What is put in front of an experts class.  `swap_experts` makes a module into one."""

    encoding: Encoding
    fmt: Format
    dtype: torch.dtype
    packed: dict[str, tuple[int, int, int]]  # parameter -> (experts, out, in)
    components: dict[str, tuple[str, ...]]  # parameter -> the parameters that it became
    num_experts: int
    has_gate: bool
    has_bias: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    @property
    def grid(self) -> Grid:
        """Of the weights."""
        return self.encoding.grid

    def names(self, param: str) -> tuple[str, ...]:
        """The parameters that `param` became, in the order in which the operators take them."""
        return self.components[param]

    def parts(self, param: str) -> list[Tensor]:
        return [cast(Tensor, self._parameters[name]) for name in self.names(param)]

    def quantized(self, param: str, expert: int) -> Quantized:
        """All that is stored of one matrix."""
        _, out_features, in_features = self.packed[param]
        return Matrix(self.parts(param), self.fmt, self.encoding, (out_features, in_features), expert).quantized()

    def fill(self, param: str, experts: Sequence[Quantized]) -> None:
        """Store the matrices of all experts."""
        packed = [self.fmt.pack(Q) for Q in experts]
        for component in packed[0]:
            stacked = torch.stack([p[component] for p in packed])
            self._parameters[component_name(param, component)] = nn.Parameter(stacked, requires_grad=False)

    def dequantize(self, param: str, dtype: torch.dtype) -> Tensor:
        """[experts, out, in]"""
        return torch.stack([dense(self.quantized(param, e), dtype) for e in range(self.packed[param][0])])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every token through its experts, weighted.

        hidden_states [tokens, hidden]; top_k_index, top_k_weights [tokens, k] -> [tokens, hidden].  An index
        beyond the last expert (expert parallelism's sentinel) contributes nothing.
        """
        tokens, k = top_k_index.shape
        expert = top_k_index.reshape(-1)
        x = hidden_states.repeat_interleave(k, 0)
        x = self._project("gate_up_proj" if self.has_gate else "up_proj", x, expert)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._project("down_proj", x, expert)
        weighted = x * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _project(self, param: str, x: Tensor, expert: Tensor) -> Tensor:
        weight = self.fmt.name, str(self.encoding), *self.packed[param][1:]
        y: Tensor = torch.ops.hfquant.experts(x, expert, self.parts(param), *weight)
        if self.has_bias:
            bias = getattr(self, f"{param}_bias")[expert.clamp(max=self.num_experts - 1)].to(y.dtype)
            y = y + bias * (expert < self.num_experts)[:, None]
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        parts = [part for param in self.packed for part in self.parts(param)]
        for param in self.packed:
            cache.forget(self.parts(param))
        super()._apply(keep_dtype(fn, parts), recurse)
        if not parts[0].is_meta:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def swap_experts(module: nn.Module, encoding: Encoding, fmt: Format, scale_dtype: torch.dtype) -> None:
    """Make dense experts into packed ones on meta, in place.  Raises FormatError if they cannot be."""
    if reason := refuses(module):
        raise FormatError(
            f"the experts of {type(module).__name__} cannot be compressed: {reason}",
            "keep them: add the module to `keep`",
        )
    packed = matrices(module)
    for param, shape in packed.items():
        if reason := fmt.refuses(encoding, shape[1:], "experts"):
            raise FormatError(
                f"format `{fmt.name}` cannot store {param} as {encoding}: {reason}", "use `format: native`"
            )
    dtype = cast(Tensor, module._parameters[next(iter(packed))]).dtype
    for param, shape in packed.items():
        del module._parameters[param]
        declare(module, specs(param, shape, encoding, fmt, scale_dtype), "meta")
    kind: Any = type(module)
    module.__class__ = type("Q" + kind.__name__, (QExperts, kind), {"__module__": kind.__module__})
    experts = cast(QExperts, module)
    experts.components = {p: tuple(specs(p, shape, encoding, fmt, scale_dtype)) for p, shape in packed.items()}
    experts.packed, experts.encoding, experts.fmt, experts.dtype = packed, encoding, fmt, dtype


def dequantize_experts_(module: QExperts, dtype: torch.dtype) -> None:
    """Back to the dense class, in place."""
    for param in module.packed:
        W = module.dequantize(param, dtype)
        cache.forget(module.parts(param))
        for name in module.names(param):
            del module._parameters[name]
        module.register_parameter(param, nn.Parameter(W, requires_grad=False))
    module.__class__ = type(module).__mro__[2]

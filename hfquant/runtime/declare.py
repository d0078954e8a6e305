"""Parameters for the components of a format."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..tensors.formats import Spec


def declare(module: nn.Module, spec: Spec, device: torch.device | str) -> tuple[str, ...]:
    """One frozen parameter per component, under the component's own name; returns the names."""
    for name, (shape, dtype) in spec.items():
        param = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        if param.is_meta:
            # otherwise transformers' _init_weights would call normal_() on packed integers that stay on meta
            param._is_hf_initialized = True  # type: ignore[attr-defined]
        module.register_parameter(name, param)
    return tuple(spec)


def keep_dtype(fn: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module.to` does, except that packed components change only their device.

    The type of a scale belongs to the checkpoint: to round it again would change the weights, and what is
    saved.
    """
    packed = {id(part) for part in parts}

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) in packed and moved.dtype != tensor.dtype:
            return tensor.to(moved.device)
        return moved

    return apply

"""Parameters for the components of a format."""

import torch
from torch import nn

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

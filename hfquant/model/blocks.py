"""A model as stacks of blocks, and a block as layers: found by looking, without a table of architectures."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import SourceError


@dataclass(frozen=True)
class Stack:
    """A ModuleList whose blocks hand a hidden state on, one to the next."""

    name: str
    blocks: tuple[str, ...]


def stacks(model: nn.Module) -> list[Stack]:
    """Every outermost ModuleList that holds linear layers, in the order of the modules.

    Decoders have one, encoder-decoders two.  Raises SourceError for a model without any.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack.name + ".") for stack in found)
        if isinstance(module, nn.ModuleList) and not inside and any(weights(block) for block in module):
            found.append(Stack(name, tuple(f"{name}.{i}" for i in range(len(module)))))
    if not found:
        raise SourceError(
            f"{type(model).__name__} has no stack of blocks to work through",
            "hfquant streams models whose layers stand in an nn.ModuleList, as all transformers language models' do",
        )
    return found


@dataclass(frozen=True)
class Weight:
    """One weight matrix of a block, or one per expert.

    name: the parameter, relative to the block.  module: the module that owns it.  kind: "linear", "conv1d" (stored
    transposed) or "experts" (3-D).
    """

    name: str
    module: str
    kind: str

    def shape(self, block: nn.Module) -> tuple[int, int]:
        """(out_features, in_features), whichever way round the parameter is."""
        p = block.get_parameter(self.name)
        return (p.shape[1], p.shape[0]) if self.kind == "conv1d" else (p.shape[-2], p.shape[-1])

    def experts(self, block: nn.Module) -> int:
        return block.get_parameter(self.name).shape[0] if self.kind == "experts" else 1

    def get(self, block: nn.Module) -> Tensor:
        """[out, in], or [experts, out, in]"""
        p = block.get_parameter(self.name).detach()
        return p.T if self.kind == "conv1d" else p

    def put(self, block: nn.Module, W: Tensor) -> None:
        """Write [out, in] or [experts, out, in] into the parameter, in its own dtype."""
        p = block.get_parameter(self.name)
        p.data.copy_(W.T if self.kind == "conv1d" else W)


def weights(block: nn.Module) -> list[Weight]:
    """The weight matrices of a block: linear layers, GPT-2's transposed ones, and fused experts."""
    found = []
    for name, module in block.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            found.append(Weight(f"{dot}weight", name, "linear"))
        elif isinstance(module, Conv1D):
            found.append(Weight(f"{dot}weight", name, "conv1d"))
        elif is_fused_experts(module):
            found += [
                Weight(f"{dot}{leaf}", name, "experts")
                for leaf, p in module.named_parameters(recurse=False)
                if p.ndim == 3 and not leaf.endswith("bias")
            ]
    return found


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this holds all experts in 3-D parameters [experts, out, in], as transformers 5 builds them.

    Known by the flags its experts interface sets.  Experts stored [in, out], with biases or with norms of their own
    are left as they are.
    """
    flags = all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "is_concatenated", "has_bias"))
    return (
        flags
        and not module.is_transposed
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
        and any(p.ndim == 3 for p in module.parameters(recurse=False))
    )


def hidden(output: object) -> Tensor:
    """The hidden state among what a block returns."""
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, torch.Tensor):
        raise SourceError(f"a block returned {type(output).__name__}, no hidden state among it")
    return first

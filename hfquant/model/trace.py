"""One run of a block, watched: what each of its layers reads, whose output that is, and what comes out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import is_fused_experts, weights

ROWS = 512  # of every tensor that are kept for comparison, spread over all of it


@dataclass
class Trace:
    """A run of a block.

    inputs: module name -> the rows it read, for all that own a weight matrix; outputs: what came out of the block.
    Where asked for: `whole`, the inputs in full; `address`, which modules read the very same tensor; `made`, the
    producer whose output that tensor is; `order`, the modules as they were reached; `first`, what each made of the
    first token [samples, out].
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    address: dict[str, int] = field(default_factory=dict)
    made: dict[int, str] = field(default_factory=dict)
    first_in: dict[str, Tensor] = field(default_factory=dict)
    first_out: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    given: set[int] = field(default_factory=set)  # addresses of what the block was called with


def norms(block: nn.Module) -> dict[str, nn.Module]:
    """The normalization modules of a block by name: those with a weight per channel and a class called so."""
    return {
        name: module
        for name, module in block.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 1
    }


def readers(block: nn.Module) -> dict[str, nn.Module]:
    """The modules that own weight matrices, fused experts included."""
    return {name: block.get_submodule(name) for name in dict.fromkeys(w.module for w in weights(block))}


def sample(x: Tensor) -> Tensor:
    """Up to ROWS rows of it, float32 [rows, features]."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x[:: max(1, -(-x.shape[0] // ROWS))].float().clone()


def trace(block: nn.Module, run: Callable[[], tuple[Any, list[Tensor]]]) -> Trace:
    """Run a block.  `run` returns what came out, and the tensors it was called with."""
    found, alive = Trace(), []

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            alive.append(x)  # so that no address is used twice while the block runs
            if name in found.inputs:
                found.repeated.add(name)
                return
            found.order.append(name)
            found.inputs[name], found.address[name] = sample(x), x.data_ptr()
            if x.ndim == 3:
                found.first_in[name] = x[:, 0].float().clone()

        return hook

    def wrote(name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                alive.append(y)
                found.made[y.data_ptr()] = name
                if y.ndim == 3 and name not in found.first_out:
                    found.first_out[name] = y[:, 0].float().clone()

        return hook

    with ExitStack() as hooks:
        for name, module in readers(block).items():
            hooks.callback(module.register_forward_pre_hook(read(name), with_kwargs=True).remove)
            if not is_fused_experts(module):
                hooks.callback(module.register_forward_hook(wrote(name)).remove)
        for name, module in norms(block).items():
            hooks.callback(module.register_forward_hook(wrote(name)).remove)
        output, arguments = run()
    found.given = {t.data_ptr() for t in arguments}
    found.outputs = [sample(t) for t in tensors(output) if t.is_floating_point() and t.ndim > 1]
    return found


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)


def apart(a: Tensor, b: Tensor, *, routed: bool = False) -> float:
    """‖a − b‖ / ‖b‖; the worst kind of NaN is infinity.

    routed: of the token that is the worst but for one in twenty.  Where tokens are sent to experts, rounding alone may
    send one of them elsewhere.
    """
    if a.shape != b.shape or not torch.isfinite(a).all():
        return float("inf")
    if not routed:
        return float((a - b).norm() / b.norm().clamp(min=1e-30))
    each = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
    return float(each.quantile(0.95))

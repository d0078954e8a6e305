"""Layers of a block read what they will read when the model runs: divided, rounded, with scales that were measured."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import Weight
from ..tensors.activations import fake_quantize, scale_of
from ..tensors.encoding import Activations
from ..tensors.layer import Quantized

ONE_SIDED = 0.25  # behind a ReLU or GELU the shorter side of a token's range is below this share of the longer one


@dataclass(frozen=True)
class Reading:
    """How a recipe wants the inputs of a weight rounded.

    automatic: asymmetric where they turn out to be one-sided.  clip: of static ones, the percentile of the tokens'
    ranges that the scale is made for.
    """

    activations: Activations
    automatic: bool = False
    clip: float = 100.0

    @property
    def needs_ranges(self) -> bool:
        """Whether inputs must be seen before it is decided."""
        return self.automatic or self.activations.per == "static"

    @classmethod
    def of(cls, what: Any) -> "Reading | None":
        """From what a target says: nothing, activations, or a recipe's specification of them."""
        if what is None:
            return None
        if isinstance(what, Activations):
            return cls(what)
        return cls(what.build(), what.symmetric is None, what.clip)


@dataclass(frozen=True)
class Rounded:
    """What became of it: what is stored beside the weight.  scale: the input is divided by it first."""

    scale: Tensor | None = None
    activations: Activations | None = None
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x as it enters the product, times the factors it was divided by: the block's weights do not know of them."""
        if self.scale is not None:
            s = self.scale.to(x.device)
            return self._round(x.float() / s).mul_(s).to(x.dtype)
        return self._round(x)

    def _round(self, x: Tensor) -> Tensor:
        if self.activations is None:
            return x
        return fake_quantize(x, self.activations, self.static_scale, self.static_zero)

    def divided(self, s: Tensor | None) -> "Rounded":
        """The same with other factors, as far as that can be said before anything was measured with them."""
        if self.activations is not None and self.activations.per == "static":
            return Rounded(s, replace(self.activations, per="tensor"))
        return replace(self, scale=s)

    def on(self, Q: Quantized) -> Quantized:
        return replace(
            Q,
            input_scale=self.scale,
            activations=self.activations,
            activation_scale=self.static_scale,
            activation_zero=self.static_zero,
        )

    def hook(self, module: nn.Module) -> Any:
        """Have a module read this; returns the handle that ends it."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, kwargs | {name: self(kwargs[name])}

        return module.register_forward_pre_hook(read, with_kwargs=True)


@dataclass
class Ranges:
    """The range of every token that reached an input, divided by its factors."""

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.low.append(x.amin(-1).float().cpu().clamp(max=0))
        self.high.append(x.amax(-1).float().cpu().clamp(min=0))

    @property
    def one_sided(self) -> bool:
        low, high = -torch.cat(self.low), torch.cat(self.high)
        return float(torch.minimum(low, high).mean()) < ONE_SIDED * float(torch.maximum(low, high).mean())

    def span(self, clip: float) -> tuple[Tensor, Tensor]:
        """The range that `clip` percent of the tokens stay within on each side, [1] each."""
        q = clip / 100
        return -_quantile(-torch.cat(self.low), q)[None], _quantile(torch.cat(self.high), q)[None]


def _quantile(x: Tensor, q: float) -> Tensor:
    """Of any number of values, unlike torch's."""
    at = min(len(x) - 1, int(q * (len(x) - 1) + 0.999999))
    return x.sort().values[at]


def measured(reading: Reading, scale: Tensor | None, ranges: Ranges | None, free: bool) -> tuple[Rounded, str | None]:
    """What a reading comes to on the calibration text, and what there is to say about it.

    ranges: None where no text came.  free: whether the checkpoint's format can say more than symmetric grids.
    """
    activations, note = reading.activations, None
    if ranges is None:
        if activations.per == "static":
            activations, note = replace(activations, per="tensor"), "no inputs seen: their scale is found at run time"
        return Rounded(scale, activations), note
    if reading.automatic and free and ranges.one_sided:
        activations = replace(activations, symmetric=False)
    if activations.per != "static":
        return Rounded(scale, activations), note
    return Rounded(scale, activations, *scale_of(*ranges.span(reading.clip), activations)), note


class Rounding:
    """The hooks on one block's layers.  `close()` takes them off."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.hooks, self.of = block, ExitStack(), dict[Weight, Rounded]()

    def __enter__(self) -> "Rounding":
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.close()

    def put(self, rounded: Mapping[Weight, Rounded]) -> None:
        for weight, how in rounded.items():
            if weight in self.of:
                continue
            self.of[weight] = how
            plain = how.activations is None and how.scale is None
            first = all(other == weight or other.module != weight.module for other in self.of)
            if not plain and first:
                self.hooks.callback(how.hook(self.block.get_submodule(weight.module)).remove)

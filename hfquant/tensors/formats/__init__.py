"""Wire formats: which tensors a compressed layer becomes in a checkpoint, and what config.json says of them.

The file name is the registry: `gptq.py` defines the format "gptq".  A format is a module-level object `FORMAT`
that satisfies the protocol below; adding one touches nothing else.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import FormatError
from ..grid import Grid
from ..layer import Quantized

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]
KINDS = ("linear", "conv1d", "experts", "embedding")


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How the layers of one checkpoint are stored: the content of its `quantization_config`.

    `layers` names every compressed module and its grid; `ignore` names the linear modules left as they were.
    `scale_dtype` is the type of the stored scales.  `raw` is the dict this was read from, written back verbatim
    on save so that a load and a save change nothing.
    """

    format: str
    layers: Mapping[str, Grid] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    scale_dtype: torch.dtype = torch.float16
    raw: Mapping[str, Any] | None = None

    def grid(self, module: str) -> Grid | None:
        """The grid of a module by its name in the model, None if it is stored as it was.

        Keys of `layers` are exact names, or globs where the config came from a format that stores patterns.
        """
        if module in self.layers:
            return self.layers[module]
        if any(_ignores(pattern, module) for pattern in self.ignore):
            return None
        return next(
            (grid for pattern, grid in self.layers.items() if "*" in pattern and fnmatchcase(module, pattern)),
            None,
        )


def _ignores(pattern: str, module: str) -> bool:
    """A name, a glob, or, as compressed-tensors writes it, `re:` and a regular expression for the name's start."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return fnmatchcase(module, pattern)


class Format(Protocol):
    """One way to lay compressed layers down in a safetensors file."""

    name: str
    quant_method: str  # the name stock transformers dispatches on

    def refuses(self, grid: Grid, shape: tuple[int, int], kind: str) -> str | None:
        """Why a weight [out, in] on this grid cannot be stored; None if it can.  `kind` is one of KINDS."""
        ...

    def spec(self, grid: Grid, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        """Component name -> (shape, dtype): what `pack` will return, known before any work."""
        ...

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        """Component name -> tensor.  A component `x` of module `m` is stored as the tensor `m.x`."""
        ...

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> Quantized:
        """The inverse of `pack`."""
        ...

    def config(self, wire: Wire) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        ...

    def parse(self, config: Mapping[str, Any]) -> Wire:
        """The inverse of `config`.  Raises FormatError on a config it cannot read."""
        ...


NAMES = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


def load(name: str) -> Format:
    """The format of that name.  Raises FormatError with the nearest name if there is none."""
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"choose one of {', '.join(NAMES)}"
        raise FormatError(f"unknown wire format `{name}`", hint)
    found: Format = importlib.import_module(f"{__name__}.{name}").FORMAT
    return found


def parse(config: Mapping[str, Any]) -> Wire:
    """Read a `quantization_config`.  Raises FormatError if no format here knows its `quant_method`."""
    method = str(config.get("quant_method"))
    for name in NAMES:
        if load(name).quant_method == method:
            return load(name).parse(config)
    known = ", ".join(load(name).quant_method for name in NAMES)
    raise FormatError(f"cannot read a checkpoint quantized with `{method}`", f"hfquant reads {known}")


def choose(grids: Mapping[str, tuple[Grid, tuple[int, int], str]]) -> str:
    """The most widely loadable format that can store all these layers: {module: (grid, shape, kind)}.

    compressed-tensors for symmetric 4 and 8 bit, gptq for what its kernels take, native for everything else.
    """
    for name in ("compressed_tensors", "gptq"):
        if len({grid for grid, _, _ in grids.values()}) > 1:
            break  # neither says "this layer 4 bit, that one 3" in a way that every reader understands
        if name == "compressed_tensors" and any(grid.bits not in (4, 8) for grid, _, _ in grids.values()):
            continue  # readable only by the newest runtimes; GPTQ's 2 and 3 bit kernels are everywhere
        if all(load(name).refuses(*layer) is None for layer in grids.values()):
            return name
    return "native"


def check(name: str, grids: Mapping[str, tuple[Grid, tuple[int, int], str]]) -> None:
    """Raise FormatError, naming the layer and the way out, if the format cannot store all these layers."""
    for module, layer in grids.items():
        if reason := load(name).refuses(*layer):
            raise FormatError(
                f"format `{name}` cannot store {module} as {layer[0]}: {reason}",
                "use `--set format=native`, which stores any grid, or change the grid",
            )
    distinct = {grid for grid, _, _ in grids.values()}
    if name != "native" and len(distinct) > 1:
        raise FormatError(
            f"format `{name}` cannot mix grids ({', '.join(sorted(map(str, distinct)))}) in one checkpoint",
            "use `--set format=native`, or give every layer the same grid",
        )

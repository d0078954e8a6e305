"""Wire formats: which tensors a compressed layer becomes in a checkpoint, and what config.json says of them.

The file name is the registry: `gptq.py` defines the format "gptq".  A format is a module-level object `FORMAT`
that satisfies the protocol below; adding one touches nothing else.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import FormatError
from ..encoding import Activations, Encoding, KVCache
from ..layer import LowRank, Quantized

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]
KINDS = ("linear", "conv1d", "experts", "embedding")


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How the layers of one checkpoint are stored: the content of its `quantization_config`.

    `layers` names every compressed module and how it is encoded (a grid stands for itself and nothing else);
    `ignore` names the linear modules left as they were.  `scale_dtype` is the type of the stored scales.
    `kv_cache`: how keys and values are to be kept, which only the native format says.  `raw` is the dict this was read
    from, written back verbatim on save so that a load and a save change nothing.
    """

    format: str
    layers: Mapping[str, Encoding] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    scale_dtype: torch.dtype = torch.float16
    kv_cache: KVCache | None = None
    raw: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        layers = {name: Encoding.of(encoding) for name, encoding in self.layers.items()}
        object.__setattr__(self, "layers", layers)

    def encoding(self, module: str) -> Encoding | None:
        """How a module is encoded, by its name in the model; None if it is stored as it was.

        Keys of `layers` are exact names, or globs where the config came from a format that stores patterns.
        """
        if module in self.layers:
            return self.layers[module]
        if any(_ignores(pattern, module) for pattern in self.ignore):
            return None
        return next(
            (found for pattern, found in self.layers.items() if "*" in pattern and fnmatchcase(module, pattern)),
            None,
        )

    def as_written(self, layers: Mapping[str, Encoding]) -> "Wire":
        """The same checkpoint, given how its layers turned out: known only when the work is done."""
        fmt = load(self.format)
        return replace(self, layers={**self.layers, **{n: fmt.keeps(e) for n, e in layers.items()}}, raw=None)


def _ignores(pattern: str, module: str) -> bool:
    """A name, a glob, or, as compressed-tensors writes it, `re:` and a regular expression for the name's start."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return fnmatchcase(module, pattern)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is stored beside the weights themselves; the fields are those of `Quantized`."""

    low_rank: LowRank | None = None
    input_scale: Tensor | None = None
    activations: Activations | None = None
    activation_scale: Tensor | None = None
    activation_zero: Tensor | None = None


class Format(Protocol):
    """One way to lay compressed layers down in a safetensors file."""

    name: str
    quant_method: str  # the name stock transformers dispatches on

    def refuses(self, encoding: Encoding, shape: tuple[int, int], kind: str) -> str | None:
        """Why a weight [out, in] cannot be stored so; None if it can.  `kind` is one of KINDS."""
        ...

    def keeps(self, encoding: Encoding) -> Encoding:
        """What of an encoding is left in the file: a format without sparsity stores the zeros."""
        ...

    def spec(self, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        """Component name -> (shape, dtype): what `pack` will return, known before any work."""
        ...

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        """Component name -> tensor.  A component `x` of module `m` is stored as the tensor `m.x`."""
        ...

    def unpack(self, parts: Mapping[str, Tensor], encoding: Encoding, shape: tuple[int, int]) -> Quantized:
        """The inverse of `pack`, for what the format keeps of the encoding."""
        ...

    def extras(self, parts: Mapping[str, Tensor], encoding: Encoding) -> Extras:
        """The part of `unpack` that costs nothing."""
        ...

    def config(self, wire: Wire) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        ...

    def parse(self, config: Mapping[str, Any]) -> Wire:
        """The inverse of `config`.  Raises FormatError on a config it cannot read."""
        ...


NAMES = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


@cache
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


Layers = Mapping[str, tuple[Encoding, tuple[int, int], str]]  # module -> (encoding, shape, kind)


def choose(layers: Layers) -> str:
    """The most widely loadable format that can store all these layers.

    compressed-tensors for symmetric 4 and 8 bit, with 8-bit activations where the weights are 8 bit per channel; gptq
    for what its kernels take; native for everything else, sparsity above all, which no other format makes smaller.
    """
    encodings = {encoding for encoding, _, _ in layers.values()}
    if len(encodings) > 1 or any(encoding.sparsity for encoding in encodings):
        return "native"  # no other says "this layer 4 bit, that one 3" in a way that every reader understands
    for name in ("compressed_tensors", "gptq"):
        if name == "compressed_tensors" and not all(_widely_read(encoding) for encoding in encodings):
            continue
        if all(load(name).refuses(*layer) is None for layer in layers.values()):
            return name
    return "native"


def _widely_read(encoding: Encoding) -> bool:
    """Whether released runtimes read this as compressed-tensors; GPTQ's 2 and 3 bit kernels are everywhere."""
    if encoding.activations is None:
        return encoding.grid.bits in (4, 8)
    return encoding.grid.bits == 8 and encoding.grid.group_size == -1


def check(name: str, layers: Layers) -> None:
    """Raise FormatError, naming the layer and the way out, if the format cannot store all these layers."""
    fmt = load(name)
    for module, layer in layers.items():
        if reason := fmt.refuses(*layer):
            way_out = "use `--set format=native`, which stores any grid, or change the grid"
            if name == "native":
                way_out = "leave that step out, or keep this layer as it is: add it to `keep`"
            raise FormatError(f"format `{name}` cannot store {module} as {layer[0]}: {reason}", way_out)
    # whether activations are symmetric may be decided only when they are seen
    distinct = {_symmetric(fmt.keeps(encoding)) for encoding, _, _ in layers.values()}
    if name != "native" and len(distinct) > 1:
        raise FormatError(
            f"format `{name}` cannot mix grids ({', '.join(sorted(map(str, distinct)))}) in one checkpoint",
            "use `--set format=native`, or give every layer the same grid",
        )


def _symmetric(encoding: Encoding) -> Encoding:
    """The same with symmetric activations, if any."""
    return replace(encoding, activations=encoding.activations and replace(encoding.activations, symmetric=True))

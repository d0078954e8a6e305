"""compressed-tensors: symmetric 4 and 8 bit, with rounded activations too; read by stock transformers and vLLM.

Components of a weight [out, in]; `u = q + 2^(bits − 1)` is our unsigned code.  Weights alone (`pack-quantized`):
  weight_packed     int32 [out, ⌈in·bits/32⌉]   one bit stream along each row, least significant bit first
  weight_scale      [out, groups]               in the model's dtype
  weight_shape      int64 [2]                   (out, in)
with activations (`int-quantized`), whose weights take a byte each whatever their bits:
  weight            int8 [out, in]              q
  weight_scale      [out, groups]
  input_scale       float32 [1]                 where activations are static
  input_zero_point  int8 [1]                    where they are static and asymmetric

Weights that a mask drops are stored as the code of zero.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..encoding import Activations, Encoding, Per
from ..grid import Grid
from ..layer import Quantized
from ..packing import pack_stream, unpack_stream, words
from . import Extras, Spec, Wire

# how the standard calls what one scale of the activations is for
STRATEGIES: dict[Per, str] = {"token": "token", "tensor": "tensor", "static": "tensor", "group": "group"}


class CompressedTensors:
    name = "compressed_tensors"
    quant_method = "compressed-tensors"

    def refuses(self, encoding: Encoding, shape: tuple[int, int], kind: str) -> str | None:
        grid = encoding.grid
        if kind not in ("linear", "experts"):
            return f"its readers expect nn.Linear, not {kind}"
        if not grid.symmetric:
            return "its readers fail on packed zero points"
        if grid.bits not in (2, 3, 4, 8):
            return f"{grid.bits} bit is not readable by released runtimes"
        if shape[1] % grid.columns(shape[1]):
            return f"group {grid.group_size} does not divide {shape[1]} columns"
        if encoding.rank:
            return "it has no low-rank factors"
        if encoding.scaled_input:
            return "it has no scale for the columns of the input"
        return _refuses_activations(encoding.activations, shape[1], kind)

    def keeps(self, encoding: Encoding) -> Encoding:
        return replace(encoding, sparsity=None)

    def spec(self, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        (out_features, in_features), grid = shape, encoding.grid
        scale = ((out_features, grid.groups(in_features)), scale_dtype)
        if encoding.activations is None:
            packed = ((out_features, words(in_features, grid.bits)), torch.int32)
            return {"weight_packed": packed, "weight_scale": scale, "weight_shape": ((2,), torch.int64)}
        spec: Spec = {"weight": (shape, torch.int8), "weight_scale": scale}
        if encoding.activations.per == "static":
            spec["input_scale"] = ((1,), torch.float32)
            if not encoding.activations.symmetric:
                spec["input_zero_point"] = ((1,), torch.int8)
        return spec

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        codes, bits = Q.filled.codes, Q.grid.bits
        if Q.activations is None:
            shape = torch.tensor(Q.shape, dtype=torch.int64)
            return {"weight_packed": pack_stream(codes, bits), "weight_scale": Q.scale, "weight_shape": shape}
        parts = {"weight": (codes.to(torch.int16) - Q.grid.middle).to(torch.int8), "weight_scale": Q.scale}
        if Q.activation_scale is not None:
            parts["input_scale"] = Q.activation_scale
            if Q.activation_zero is not None and not Q.activations.symmetric:
                parts["input_zero_point"] = Q.activation_zero.to(torch.int8)
        return parts

    def unpack(self, parts: Mapping[str, Tensor], encoding: Encoding, shape: tuple[int, int]) -> Quantized:
        scale, grid = parts["weight_scale"], encoding.grid
        if encoding.activations is None:
            codes = unpack_stream(parts["weight_packed"], grid.bits, shape[1])
        else:
            codes = (parts["weight"].to(torch.int16) + grid.middle).to(torch.uint8)
        zero_point = torch.full_like(scale, grid.middle, dtype=torch.uint8)
        extras = vars(self.extras(parts, encoding))
        return Quantized(codes=codes, scale=scale, zero_point=zero_point, grid=grid, **extras)

    def extras(self, parts: Mapping[str, Tensor], encoding: Encoding) -> Extras:
        zero = parts.get("input_zero_point")
        return Extras(
            activations=encoding.activations,
            activation_scale=parts.get("input_scale"),
            activation_zero=None if zero is None else zero.float(),
        )

    def config(self, wire: Wire) -> dict[str, Any]:
        groups: dict[Encoding, list[str]] = {}
        for module, encoding in wire.layers.items():
            groups.setdefault(encoding, []).append(module)
        if len(groups) == 1:  # said so, it is what every reader has seen
            groups = {encoding: ["Linear"] for encoding in groups}
        rounded = any(encoding.activations for encoding in groups)
        return {
            "quant_method": self.quant_method,
            "format": "int-quantized" if rounded else "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(wire.ignore),
            "kv_cache_scheme": None,
            "config_groups": {
                f"group_{i}": _group(encoding) | {"targets": targets}
                for i, (encoding, targets) in enumerate(groups.items())
            },
        }

    def parse(self, config: Mapping[str, Any]) -> Wire:
        layers: dict[str, Encoding] = {}
        for group in config["config_groups"].values():
            encoding, whole = _encoding(group, config), group["targets"] == ["Linear"]
            layers |= {"*": encoding} if whole else dict.fromkeys(group["targets"], encoding)
        classes = [target for target in layers if ":" in target or target[:1].isupper()]  # or expressions for them
        if classes or (len(config["config_groups"]) > 1 and "*" in layers):
            raise _unreadable()
        return Wire(format=self.name, layers=layers, ignore=tuple(config.get("ignore") or ()), raw=config)


def _unreadable() -> FormatError:
    return FormatError(
        "this compressed-tensors checkpoint uses more than one symmetric integer group",
        "load it with transformers and the compressed-tensors package",
    )


def _group(encoding: Encoding) -> dict[str, Any]:
    """A scheme and, still to be named, the layers that have it."""
    grid, activations = encoding.grid, encoding.activations
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "dynamic": False,
    }
    if grid.group_size != -1:
        weights["group_size"] = grid.group_size
    return {
        "weights": weights,
        "input_activations": None if activations is None else _activations(activations),
        "output_activations": None,
    }


def _encoding(group: Mapping[str, Any], config: Mapping[str, Any]) -> Encoding:
    """The inverse.  Raises FormatError on a scheme that hfquant does not write."""
    weights, inputs = group["weights"], group.get("input_activations")
    readable = (
        weights["type"] == "int"
        and weights["symmetric"]
        and weights["strategy"] in ("group", "channel")
        and (not inputs or (inputs["type"] == "int" and config.get("format") == "int-quantized"))
    )
    if not readable:
        raise _unreadable()
    grid = Grid(weights["num_bits"], weights.get("group_size") or -1, True)
    return Encoding(grid, activations=_read_activations(inputs) if inputs else None)


def _refuses_activations(activations: Activations | None, in_features: int, kind: str) -> str | None:
    if activations is None:
        return None
    if activations.bits != 8:
        return f"its readers round activations to 8 bit, not {activations.bits}"
    if activations.per == "group" and in_features % activations.group_size:
        return f"group {activations.group_size} of activations does not divide {in_features} columns"
    if activations.per == "static" and kind == "experts":
        return "a static scale for every expert's input cannot be stored with fused experts"
    return None


def _activations(activations: Activations) -> dict[str, Any]:
    """`input_activations` of a group."""
    said: dict[str, Any] = {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.symmetric,
        "strategy": STRATEGIES[activations.per],
        "dynamic": activations.per != "static",
    }
    return said | ({"group_size": activations.group_size} if activations.per == "group" else {})


def _read_activations(said: Mapping[str, Any]) -> Activations:
    """The inverse.  Raises FormatError on a strategy that hfquant does not run."""
    strategy, dynamic = said["strategy"], bool(said["dynamic"])
    pers = {s: per for per, s in STRATEGIES.items() if (per == "static") != dynamic}
    if strategy not in pers:
        raise FormatError(
            f"this compressed-tensors checkpoint rounds activations per {strategy}, dynamic: {dynamic}",
            "load it with transformers and the compressed-tensors package",
        )
    return Activations(said["num_bits"], pers[strategy], said.get("group_size") or -1, bool(said["symmetric"]))


FORMAT = CompressedTensors()

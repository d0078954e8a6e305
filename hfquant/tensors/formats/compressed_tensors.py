"""compressed-tensors, `pack-quantized`: symmetric 4 and 8 bit, read by stock transformers and vLLM.

Components of a weight [out, in]; `u = q + 2^(bits − 1)` is our unsigned code:
  weight_packed  int32 [out, ⌈in·bits/32⌉]   one bit stream along each row, least significant bit first
  weight_scale   [out, groups]               in the model's dtype
  weight_shape   int64 [2]                   (out, in)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..grid import Grid
from ..layer import Quantized
from ..packing import pack_stream, unpack_stream, words
from . import Spec, Wire


class CompressedTensors:
    name = "compressed_tensors"
    quant_method = "compressed-tensors"

    def refuses(self, grid: Grid, shape: tuple[int, int], kind: str) -> str | None:
        if kind not in ("linear", "experts"):
            return f"its readers expect nn.Linear, not {kind}"
        if not grid.symmetric:
            return "its readers fail on packed zero points"
        if grid.bits not in (2, 3, 4, 8):
            return f"{grid.bits} bit is not readable by released runtimes"
        if shape[1] % grid.columns(shape[1]):
            return f"group {grid.group_size} does not divide {shape[1]} columns"
        return None

    def spec(self, grid: Grid, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        out_features, in_features = shape
        return {
            "weight_packed": ((out_features, words(in_features, grid.bits)), torch.int32),
            "weight_scale": ((out_features, grid.groups(in_features)), scale_dtype),
            "weight_shape": ((2,), torch.int64),
        }

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_stream(Q.codes, Q.grid.bits),
            "weight_scale": Q.scale,
            "weight_shape": torch.tensor(Q.shape, dtype=torch.int64),
        }

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> Quantized:
        scale = parts["weight_scale"]
        return Quantized(
            codes=unpack_stream(parts["weight_packed"], grid.bits, shape[1]),
            scale=scale,
            zero_point=torch.full_like(scale, grid.middle, dtype=torch.uint8),
            grid=grid,
        )

    def config(self, wire: Wire) -> dict[str, Any]:
        (grid,) = set(wire.layers.values())
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
            "quant_method": self.quant_method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(wire.ignore),
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        }

    def parse(self, config: Mapping[str, Any]) -> Wire:
        groups = list(config["config_groups"].values())
        group = groups[0]
        weights = group["weights"]
        readable = (
            len(groups) == 1
            and group["targets"] == ["Linear"]
            and not group.get("input_activations")
            and weights["type"] == "int"
            and weights["symmetric"]
            and weights["strategy"] in ("group", "channel")
        )
        if not readable:
            raise FormatError(
                "this compressed-tensors checkpoint uses more than one symmetric integer group",
                "load it with transformers and the compressed-tensors package",
            )
        grid = Grid(weights["num_bits"], weights.get("group_size") or -1, True)
        return Wire(format=self.name, layers={"*": grid}, ignore=tuple(config.get("ignore") or ()), raw=config)


FORMAT = CompressedTensors()

"""hfquant's own format: any width, any group size, ragged last groups, embeddings, mixed grids.

Components of a weight [out, in]:
  weight             int8 [out, plane_words(in, bits), 4]   the int32 words of `packing.pack_planes`, as bytes
  weight_scale       fp16/bf16/fp32 [out, groups]
  weight_zero_point  uint8 [out, groups]                    only where the grid is not symmetric

The packed tensor takes the name `weight` with another shape (three dimensions), so that a loader that does not
know this format stops at the shape instead of generating garbage.  It is int8 because models look at
`layer.weight.dtype`: T5 and its relatives cast the activations to it unless it is int8, which they take for a
quantized weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..grid import Grid
from ..layer import Quantized
from ..packing import pack_planes, plane_words, unpack_planes
from . import Spec, Wire

VERSION = 1


class Native:
    name = "native"
    quant_method = "hfquant"

    def refuses(self, grid: Grid, shape: tuple[int, int], kind: str) -> str | None:
        return None

    def spec(self, grid: Grid, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        out_features, in_features = shape
        groups = (out_features, grid.groups(in_features))
        spec: Spec = {
            "weight": ((out_features, plane_words(in_features, grid.bits), 4), torch.int8),
            "weight_scale": (groups, scale_dtype),
        }
        if not grid.symmetric:
            spec["weight_zero_point"] = (groups, torch.uint8)
        return spec

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        bytes_ = pack_planes(Q.codes, Q.grid.bits).view(torch.int8).unflatten(1, (-1, 4))
        parts = {"weight": bytes_, "weight_scale": Q.scale}
        if not Q.grid.symmetric:
            parts["weight_zero_point"] = Q.zero_point
        return parts

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> Quantized:
        scale = parts["weight_scale"]
        zero = torch.full_like(scale, grid.middle, dtype=torch.uint8) if grid.symmetric else parts["weight_zero_point"]
        packed = parts["weight"].contiguous()
        if packed.storage_offset() % 4:  # a slice of a memory-mapped file need not begin on a word
            packed = packed.clone()
        codes = unpack_planes(packed.view(torch.int32).squeeze(-1), grid.bits, shape[1])
        return Quantized(codes=codes, scale=scale, zero_point=zero, grid=grid)

    def config(self, wire: Wire) -> dict[str, Any]:
        grids: dict[Grid, list[str]] = {}
        for module, grid in wire.layers.items():
            grids.setdefault(grid, []).append(module)
        return {
            "quant_method": self.quant_method,
            "format": self.name,
            "version": VERSION,
            "scale_dtype": str(wire.scale_dtype).removeprefix("torch."),
            "groups": [
                {"bits": g.bits, "group_size": g.group_size, "symmetric": g.symmetric, "modules": modules}
                for g, modules in grids.items()
            ],
            "modules_to_not_convert": list(wire.ignore),
        }

    def parse(self, config: Mapping[str, Any]) -> Wire:
        if config.get("version") != VERSION:
            raise FormatError(
                f"native format version {config.get('version')} is not known to this hfquant (it writes {VERSION})",
                "upgrade hfquant: `pip install -U hfquant`",
            )
        layers = {
            module: Grid(group["bits"], group["group_size"], group["symmetric"])
            for group in config["groups"]
            for module in group["modules"]
        }
        return Wire(
            format=self.name,
            layers=layers,
            ignore=tuple(config["modules_to_not_convert"]),
            scale_dtype=getattr(torch, config["scale_dtype"]),
            raw=config,
        )


FORMAT = Native()

"""hfquant's own format: any width, any group size, ragged last groups, embeddings, mixed grids, and what else there is.

Components of a weight [out, in]:
  weight             int8 [out, plane_words(in, bits), 4]   the int32 words of `packing.pack_planes`, as bytes
  weight_scale       fp16/bf16/fp32 [out, groups]           no columns on a grid of 16 bits, but still its type
  weight_zero_point  uint8 [out, groups]                    only where the grid is not symmetric
  weight_index, weight_mask                                 of sparse weights: see `_values.py`
  weight_u, weight_v, ...                                   low rank, input scale, static activations: `_beside.py`

The packed tensor takes the name `weight` with another shape (three dimensions), so that a loader that does not
know this format stops at the shape instead of generating garbage.  It is int8 because models look at
`layer.weight.dtype`: T5 and its relatives cast the activations to it unless it is int8, which they take for a
quantized weight.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..encoding import Activations, Encoding, KVCache, Sparsity
from ..grid import Grid
from ..layer import Quantized
from . import Extras, Spec, Wire, _beside, _values

PLAIN, VERSION = 1, 2  # what is written where every layer is a grid and nothing else, and otherwise


class Native:
    name = "native"
    quant_method = "hfquant"

    def refuses(self, encoding: Encoding, shape: tuple[int, int], kind: str) -> str | None:
        return _values.refuses(encoding.sparsity, shape, kind) or _beside.refuses(encoding, kind)

    def keeps(self, encoding: Encoding) -> Encoding:
        return encoding

    def spec(self, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        grid, groups = encoding.grid, (shape[0], encoding.grid.groups(shape[1]))
        values = _values.spec(encoding, shape, scale_dtype)
        spec: Spec = {"weight": values.pop("weight"), "weight_scale": (groups, scale_dtype)}
        if _has_zero_points(grid):
            spec["weight_zero_point"] = (groups, torch.uint8)
        return spec | values | _beside.spec(encoding, shape)

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        values = _values.pack(Q)
        parts = {"weight": values.pop("weight"), "weight_scale": Q.scale}
        if _has_zero_points(Q.grid):
            parts["weight_zero_point"] = Q.zero_point
        return parts | values | _beside.pack(Q)

    def unpack(self, parts: Mapping[str, Tensor], encoding: Encoding, shape: tuple[int, int]) -> Quantized:
        scale, grid, places = parts["weight_scale"], encoding.grid, encoding.sparsity
        zero = parts.get("weight_zero_point")
        if zero is None:
            zero = torch.full_like(scale, 0 if grid.is_float else grid.middle, dtype=torch.uint8)
        codes, mask = _values.unpack(parts, encoding, shape, scale.dtype)
        return Quantized(
            codes=codes,
            scale=scale,
            zero_point=zero,
            grid=grid,
            mask=mask,
            pattern=(places.n, places.m) if places and places.m else None,
            **vars(self.extras(parts, encoding)),
        )

    def extras(self, parts: Mapping[str, Tensor], encoding: Encoding) -> Extras:
        return _beside.extras(parts, encoding)

    def config(self, wire: Wire) -> dict[str, Any]:
        groups: dict[Encoding, list[str]] = {}
        for module, encoding in wire.layers.items():
            groups.setdefault(encoding, []).append(module)
        return {
            "quant_method": self.quant_method,
            "format": self.name,
            "version": PLAIN if all(encoding.plain for encoding in groups) else VERSION,
            "scale_dtype": str(wire.scale_dtype).removeprefix("torch."),
            "groups": [_group(encoding) | {"modules": modules} for encoding, modules in groups.items()],
            "modules_to_not_convert": list(wire.ignore),
        } | ({"kv_cache": wire.kv_cache.said} if wire.kv_cache else {})

    def parse(self, config: Mapping[str, Any]) -> Wire:
        if config.get("version") not in (PLAIN, VERSION):
            raise FormatError(
                f"native format version {config.get('version')} is not known to this hfquant (it writes {VERSION})",
                "upgrade hfquant: `pip install -U hfquant`",
            )
        layers = {module: _encoding(group) for group in config["groups"] for module in group["modules"]}
        return Wire(
            format=self.name,
            layers=layers,
            ignore=tuple(config["modules_to_not_convert"]),
            scale_dtype=getattr(torch, config["scale_dtype"]),
            kv_cache=_cache(config.get("kv_cache")),
            raw=config,
        )


def _has_zero_points(grid: Grid) -> bool:
    return not grid.symmetric and not grid.is_float


def _cache(said: Mapping[str, Any] | None) -> KVCache | None:
    """Raises FormatError for a cache that a newer hfquant wrote."""
    if said is None:
        return None
    try:
        return KVCache(**said)
    except TypeError:
        raise FormatError(
            f"a KV cache {dict(said)} is not known to this hfquant", "upgrade hfquant: `pip install -U hfquant`"
        ) from None


def _group(encoding: Encoding) -> dict[str, Any]:
    """What the config says of the layers with this encoding: of a grid alone, nothing but the grid."""
    grid = encoding.grid
    said: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    if encoding.sparsity is not None:
        said["sparsity"] = asdict(encoding.sparsity)
    if encoding.rank:
        said["rank"] = encoding.rank
    if encoding.activations is not None:
        said["activations"] = asdict(encoding.activations)
    return said | ({"scaled_input": True} if encoding.scaled_input else {})


def _encoding(said: Mapping[str, Any]) -> Encoding:
    """The inverse."""
    sparsity, activations = said.get("sparsity"), said.get("activations")
    return Encoding(
        grid=Grid(said["bits"], said["group_size"], said["symmetric"]),
        sparsity=sparsity and Sparsity(**sparsity),
        rank=said.get("rank", 0),
        activations=activations and Activations(**activations),
        scaled_input=said.get("scaled_input", False),
    )


FORMAT = Native()

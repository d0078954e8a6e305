"""GPTQ's format: 2, 3, 4 and 8 bit, symmetric or not; read by transformers with gptqmodel, and by vLLM.

Components of a weight [out, in]:
  qweight  int32 [in·bits/32, out]        the bit stream runs down the input dimension
  qzeros   int32 [groups, out·bits/32]    zero points, stream along the output dimension
  scales   float16 [groups, out]
  g_idx    int32 [in]                     the group of every input column

The first version of the format stores zero points minus one, which wraps for a zero point of 0: symmetric grids
(zero point 2^(bits − 1)) are written in version 1, which every reader knows, the others in version 2, which
stores them as they are.  Weights that a mask drops are stored as the code that decodes to zero.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..encoding import Encoding
from ..grid import Grid
from ..layer import Quantized
from ..packing import pack_stream, unpack_stream
from . import Extras, Spec, Wire


class Gptq:
    name = "gptq"
    quant_method = "gptq"

    def refuses(self, encoding: Encoding, shape: tuple[int, int], kind: str) -> str | None:
        grid = encoding.grid
        if not self.keeps(encoding).plain:
            return "it stores weights and nothing else"
        if kind not in ("linear", "conv1d"):
            return f"its readers expect linear layers, not {kind}"
        if grid.bits not in (2, 3, 4, 8):
            return f"{grid.bits} bit does not exist in it"
        if shape[0] % 32 or shape[1] % 32:
            return f"{shape[0]} x {shape[1]} is not a multiple of 32"
        if shape[1] % grid.columns(shape[1]):
            return f"group {grid.group_size} does not divide {shape[1]} columns"
        return None

    def keeps(self, encoding: Encoding) -> Encoding:
        return replace(encoding, sparsity=None)

    def spec(self, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype) -> Spec:
        (out_features, in_features), grid = shape, encoding.grid
        groups = grid.groups(in_features)
        return {
            "qweight": ((in_features * grid.bits // 32, out_features), torch.int32),
            "qzeros": ((groups, out_features * grid.bits // 32), torch.int32),
            "scales": ((groups, out_features), torch.float16),
            "g_idx": ((in_features,), torch.int32),
        }

    def pack(self, Q: Quantized) -> dict[str, Tensor]:
        in_features = Q.shape[1]
        stored = Q.zero_point - 1 if Q.grid.symmetric else Q.zero_point
        return {
            "qweight": pack_stream(Q.filled.codes, Q.grid.bits).T.contiguous(),
            "qzeros": pack_stream(stored.T.contiguous(), Q.grid.bits),
            "scales": Q.scale.to(torch.float16).T.contiguous(),
            "g_idx": torch.arange(in_features, dtype=torch.int32) // Q.grid.columns(in_features),
        }

    def unpack(self, parts: Mapping[str, Tensor], encoding: Encoding, shape: tuple[int, int]) -> Quantized:
        (out_features, in_features), grid = shape, encoding.grid
        zero = unpack_stream(parts["qzeros"], grid.bits, out_features).T
        if grid.symmetric:
            zero = zero + 1
        return Quantized(
            codes=unpack_stream(parts["qweight"].T.contiguous(), grid.bits, in_features),
            scale=parts["scales"].T.contiguous(),
            zero_point=zero.contiguous(),
            grid=grid,
        )

    def extras(self, parts: Mapping[str, Tensor], encoding: Encoding) -> Extras:
        return Extras()

    def config(self, wire: Wire) -> dict[str, Any]:
        (grid,) = {encoding.grid for encoding in wire.layers.values()}
        return {
            "quant_method": self.quant_method,
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if grid.symmetric else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": False,
            "damp_percent": 0.01,
            "true_sequential": True,
            "meta": {"quantizer": ["hfquant"]},
            "modules_to_not_convert": list(wire.ignore),
        }

    def parse(self, config: Mapping[str, Any]) -> Wire:
        version = config.get("checkpoint_format", "gptq")
        if config.get("desc_act") or version != ("gptq" if config["sym"] else "gptq_v2"):
            raise FormatError(
                "this GPTQ checkpoint uses an activation order or a zero-point version hfquant did not write",
                "load it with transformers and the gptqmodel package",
            )
        grid = Grid(config["bits"], config["group_size"], config["sym"])
        ignore = tuple(config.get("modules_to_not_convert") or ())
        return Wire(
            format=self.name, layers={"*": Encoding(grid)}, ignore=ignore, scale_dtype=torch.float16, raw=config
        )


FORMAT = Gptq()

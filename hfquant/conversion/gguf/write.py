"""The file: header, vocabulary, tensors, written one tensor at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ...errors import ExportError
from ...measure import card
from ...model.headers import TensorInfo
from ...runtime.nn import Packed
from . import tokens
from .blocks import exact, pack
from .names import DENSE, Family, Names, facts, family

FILE = "model.gguf"
TYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
NUMPY = {Type.F32: np.float32, Type.F16: np.float16}


class Part(NamedTuple):
    """A tensor of the file: its name there, its type, its bytes [rows, bytes per row] (or values), when asked for."""

    name: str
    kind: Type
    data: np.ndarray[Any, Any]


def write(
    folder: Path,
    out: Path,
    model: Any,
    stored: Mapping[str, TensorInfo],
    packed: Mapping[str, Packed],
    known: Mapping[str, Any],
) -> dict[str, str]:
    """Write the compressed model in `folder` as a GGUF file -> which type every compressed layer got.

    stored: the tensors that are there by name.  packed: the packed layers by name.  known: the report.
    Raises ExportError for what the format, or this export, cannot say.
    """
    chosen = family(model.config)
    refuse_extras(packed)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[chosen.arch], use_temp_file=True)
    kinds: dict[str, str] = {}
    try:
        _add_facts(writer, model.config, chosen, known)
        tokens.add(writer, folder, tokens.load(folder), int(model.config.vocab_size))
        for part in _parts(Names(model.config, chosen), stored, packed, kinds):
            if part.kind in NUMPY:
                writer.add_tensor(part.name, part.data)
            else:
                writer.add_tensor(part.name, part.data, raw_dtype=part.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return kinds


def refuse_extras(packed: Mapping[str, Packed]) -> None:
    """Codes, scales and zeros can be said; nothing that happens to inputs or beside the product."""
    for name, module in packed.items():
        encoding = module.encoding
        if encoding.rank or encoding.activations or encoding.scaled_input:
            what = "a low-rank correction" if encoding.rank else "inputs that are rounded or divided"
            raise ExportError(f"gguf has no room for {what}, which {name} has", DENSE)


def _add_facts(writer: gguf.GGUFWriter, config: Any, chosen: Family, known: Mapping[str, Any]) -> None:
    prefix = gguf.MODEL_ARCH_NAMES[chosen.arch]
    writer.add_name(card.plain_name(known))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in facts(config, chosen).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{prefix}.{key}", value)


def _parts(
    names: Names, stored: Mapping[str, TensorInfo], packed: Mapping[str, Packed], kinds: dict[str, str]
) -> Iterator[Part]:
    """The tensors in the checkpoint's order; a layer's components become one."""
    owners = {f"{name}.{part}": name for name, module in packed.items() for part in module.components}
    done: set[str] = set()
    for name, info in stored.items():
        if name not in owners:
            yield _plain(names, name, info)
        elif (layer := owners[name]) not in done:
            done.add(layer)
            part = _compressed(names, layer, packed[layer])
            kinds[layer] = part.kind.name
            yield part
    shared = {id(packed[name].parts[0]) for name in done}
    if lost := [name for name, module in packed.items() if id(module.parts[0]) not in shared]:
        raise ExportError(f"{lost[0]} is stored under another name than it has in the model", DENSE)


def _compressed(names: Names, layer: str, module: Packed) -> Part:
    Q = module.quantized()
    name = names(f"{layer}.weight")
    if Q.grid.is_float:
        return _values(name, _turned(names, layer, Q.filled.dequantize().to(Q.codes.dtype)))
    order = names.rows(layer, Q.shape[0])
    if order is not None:
        mask = None if Q.mask is None else Q.mask[order]
        Q = replace(Q, codes=Q.codes[order], scale=Q.scale[order], zero_point=Q.zero_point[order], mask=mask)
    kind, packed = pack(Q, layer)
    if not exact(kind, packed, Q):
        raise ExportError(f"{layer} is not the same in gguf's {kind.name}", "please report this as a bug")
    return Part(name, kind, packed)


def _plain(names: Names, name: str, info: TensorInfo) -> Part:
    """A tensor as it is stored; transformers' Conv1D lies the other way round."""
    x = info.read().view(info.shape)
    if names.chosen.arch == gguf.MODEL_ARCH.GPT2 and x.ndim == 2 and ".c_" in name:
        x = x.T.contiguous()
    return _values(names(name), _turned(names, name, x))


def _turned(names: Names, name: str, x: Tensor) -> Tensor:
    order = names.rows(name, x.shape[0])
    return x if order is None else x[order]


def _values(name: str, x: Tensor) -> Part:
    """Matrices keep their type; vectors, which llama.cpp adds and multiplies in float32, become that."""
    if x.dtype not in TYPES:
        raise ExportError(f"gguf has no type for {name}, which is {x.dtype}", DENSE)
    x = x.float() if x.ndim == 1 else x
    kind = TYPES[x.dtype]
    if kind == Type.BF16:
        return Part(name, kind, x.contiguous().view(torch.uint8).numpy())
    return Part(name, kind, x.contiguous().numpy())

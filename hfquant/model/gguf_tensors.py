"""The tensors of a GGUF file as the parameters of a transformers model, made one at a time.

llama.cpp renames, permutes, fuses and quantizes.  transformers knows how to undo that, in two tables of which
the newer serves few architectures yet; both are used here as `from_pretrained(gguf_file=...)` uses them,
except that a parameter exists only while it is being written.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from ..errors import SourceError

PIECE = 1 << 21  # elements that are dequantized together: the library makes several copies of them


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file: `shape` in torch's order, `offset` and `nbytes` in the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself before its data."""

    path: Path
    architecture: str
    fields: frozenset[str]
    tensors: Mapping[str, Stored]


@dataclass(frozen=True)
class Parameters:
    """The parameters that a file has for a model; `load` makes one of them, in its final shape."""

    names: frozenset[str]
    load: Callable[[str], Tensor]


def read_header(path: Path) -> Header:
    """The header of a file that is there in full.

    Raises SourceError if it is truncated, not GGUF, one part of several, or of another byte order.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path.name} is not a GGUF file", "download it again: it is something else")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        size = path.stat().st_size
        raise SourceError(
            f"{path.name} is truncated or damaged: its {size:,} bytes end before its tensors do",
            "download it again",
        ) from error
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise SourceError(
            f"{path.name} is one of {parts.contents()} parts",
            "join them first: `llama-gguf-split --merge FIRST OUT`",
        )
    architecture = reader.get_field("general.architecture")
    if architecture is None or reader.byte_order == "S":
        why = "does not name its architecture" if architecture is None else "has the other byte order"
        raise SourceError(f"{path.name} {why}", "convert it again with a current llama.cpp")
    tensors = {
        t.name: Stored(t.name, t.tensor_type, tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    return Header(path, str(architecture.contents()), frozenset(reader.fields), tensors)


def dequantize(header: Header, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """One tensor of the file, read in pieces: the whole of it exists in `dtype` only."""
    stored = header.tensors[name]
    columns = stored.shape[-1] if stored.shape else 1
    out = torch.empty((max(1, math.prod(stored.shape) // columns), columns), dtype=dtype)
    row = stored.nbytes // len(out)
    step = max(1, PIECE // columns)
    with header.path.open("rb") as file:
        file.seek(stored.offset)
        for start in range(0, len(out), step):
            rows = min(step, len(out) - start)
            raw = np.frombuffer(file.read(rows * row), np.uint8).reshape(rows, row)
            # a copy, for a tensor over the bytes just read would not be writable
            out[start : start + rows] = torch.from_numpy(np.array(gguf.dequantize(raw, stored.kind)))
    return out.view(stored.shape)


def parameters(header: Header, model: PreTrainedModel, dtype: torch.dtype) -> Parameters:
    """The parameters of `model` (on meta) that the file has, in `dtype`."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:  # before transformers 5.23
        return _by_processor(header, model, dtype)
    if is_gguf_arch_supported(header.architecture):
        return _by_converter(header, model, dtype)
    return _by_processor(header, model, dtype)


def _by_processor(header: Header, model: PreTrainedModel, dtype: torch.dtype) -> Parameters:
    """`modeling_gguf_pytorch_utils`: a name map, and a processor per architecture on numpy arrays."""
    config = model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config)
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    parts: dict[str, list[str]] = {}
    for name in header.tensors:
        # expert stacks are mapped without their suffix
        if target := names.get(name) or names.get(name.removesuffix(".weight")):
            parts.setdefault(target, []).append(name)

    def load(parameter: str) -> Tensor:
        first = header.tensors[parts[parameter][0]]
        if names.get(first.name) == parameter and _untouched(processor, first):
            return dequantize(header, first.name, dtype)
        parsed: dict[str, Any] = {"tensors": {}, "config": config}
        for name in parts[parameter]:
            done = processor.process(
                weights=dequantize(header, name).numpy(),
                name=name,
                tensor_key_mapping=names,
                parsed_parameters=parsed,
            )
            if done.name in names:  # else the processor has put it there itself
                parsed["tensors"][names[done.name]] = torch.from_numpy(np.ascontiguousarray(done.weights))
        made: Tensor = parsed["tensors"][parameter]
        return made.to(dtype)

    return Parameters(frozenset(parts), load)


def _untouched(processor: TensorProcessor, stored: Stored) -> bool:
    """Whether the processor returns this tensor as it is, so that its float32 form need not exist as a whole.

    Asked with an array of this shape that takes no memory.
    """
    probe = np.broadcast_to(np.float32(1), stored.shape)
    done = processor.process(weights=probe, name=stored.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    return done.name == stored.name and done.weights is probe


def _by_converter(header: Header, model: PreTrainedModel, dtype: torch.dtype) -> Parameters:
    """`integrations.gguf`: the renamings and converters that safetensors go through in transformers 5."""
    from transformers.integrations.gguf import reader, utils

    theirs = reader.GgufHeader.from_file(str(header.path))
    mapping = utils.get_gguf_conversion_mapping(header.architecture, model.config)
    packed, _, _ = utils.get_gguf_plan(theirs, mapping)
    mapping = utils.add_gguf_load_ops(mapping, packed, theirs, dtype)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in header.tensors:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target in expected:
            parts.setdefault(target, []).append((name, pattern))

    def load(parameter: str) -> Tensor:
        lazy = reader.load_gguf_state_dict(theirs)
        converter = deepcopy(by_pattern[parts[parameter][0][1]])
        for name, pattern in parts[parameter]:
            converter.add_tensor(parameter, name, pattern, lambda name=name: lazy[name][...])
        made = converter.convert(parameter, model=model, config=model.config)[parameter]
        value: Tensor = made[0] if isinstance(made, list) else made
        return value.to(dtype)

    return Parameters(frozenset(parts), load)

"""A model as it lies on disk: config, tokenizer, and weights known by their headers before any is read."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import SourceError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack", ".onnx",
    ".gguf", ".ot", ".ckpt", ".tflite",
)  # fmt: skip
PIECE = 1 << 22  # elements of a tensor that are looked at together
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_bytes(file: Path, offset: int, count: int) -> Tensor:
    """uint8 [count], in memory that torch aligned: matrix products may round otherwise when it is not."""
    raw = torch.empty(count, dtype=torch.uint8)
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        view, done = raw.numpy().data, 0
        while done < count:
            got = opened.readinto(view[done:])
            if not got:
                raise SourceError(f"{file.name} ended early", "the file changed while it was read")
            done += got
    return raw


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, from its file's header."""

    file: Path
    offset: int  # of its first byte in the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """`count` elements from `start` on, flat, in memory of their own: no mapping keeps the file resident."""
        count = self.numel - start if count is None else count
        size = self.dtype.itemsize
        return read_bytes(self.file, self.offset + start * size, count * size).view(self.dtype)


@dataclass(frozen=True)
class Source:
    """A dense model in a local folder.  `id` is what the user named; `files` are the others to carry over."""

    id: str
    revision: str | None
    path: Path
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values())

    @property
    def total_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that most of the weights have."""
        sizes: dict[torch.dtype, int] = {}
        for t in self.tensors.values():
            if t.dtype.is_floating_point:
                sizes[t.dtype] = sizes.get(t.dtype, 0) + t.numel
        return max(sizes, key=lambda d: sizes[d])

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own."""
        return self.tensors[name].read().view(self.tensors[name].shape)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises SourceError if the model has no tokenizer that loads without remote code."""
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, ImportError) as error:
            raise SourceError(
                f"{self.id} has no tokenizer that can be loaded: {str(error).splitlines()[0]}",
                "put tokenizer.json and tokenizer_config.json into the model folder",
            ) from error
        return loaded


def open_source(model: str | Path, revision: str | None = None, staging: Path | None = None) -> Source:
    """A model from a folder, a GGUF file or the Hub, checked from its headers alone.

    A GGUF file is unpacked into `staging` first, tensor by tensor.  Raises SourceError for a model that is
    missing, already quantized, pickled only, dependent on remote code, incomplete or truncated.
    """
    path, found = _locate(model, revision, staging)
    config = _config(path, str(model))
    return Source(str(model), found, path, config, _tensors(path, str(model)), _other_files(path))


def _locate(model: str | Path, revision: str | None, staging: Path | None) -> tuple[Path, str | None]:
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from .gguf import stage

        if staging is None:
            raise SourceError(f"{path} must be unpacked first", "give a staging folder")
        return stage(path, staging), None
    if path.is_dir():
        return path, None
    if path.exists():
        raise SourceError(f"{path} is not a model folder", "give the folder that holds config.json, or a .gguf file")
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise SourceError(f"{path} does not exist", "give a model folder, a .gguf file or a Hub id like `org/name`")
    from .hub import download

    return download(str(model), revision)


def _config(path: Path, name: str) -> PretrainedConfig:
    file = path / "config.json"
    if not file.is_file():
        raise SourceError(f"{name} has no config.json", "give a folder in the layout of transformers' save_pretrained")
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise SourceError(f"{file.name} of {name} is not JSON: {error}", "download the model again") from error
    if quantized := raw.get("quantization_config") or raw.get("compression_config"):
        raise SourceError(
            f"{name} is already quantized ({quantized.get('quant_method', 'unknown method')})",
            "start from the original model: rounding twice costs accuracy twice",
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        if raw.get("auto_map"):
            raise SourceError(
                f"{name} brings its own modelling code ({raw.get('model_type')}), which hfquant does not run",
                "use a model of an architecture that transformers has, or convert its checkpoint to one",
            ) from error
        raise SourceError(
            f"transformers cannot read the config of {name}: {str(error).splitlines()[0]}",
            "check `model_type` in config.json, or upgrade transformers",
        ) from error
    return config


def _tensors(path: Path, name: str) -> dict[str, TensorInfo]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = [path / file for file in sorted(set(weight_map.values()))]
    else:
        weight_map, files = {}, sorted(path.glob("*.safetensors"))
    if not files:
        _refuse_other_weights(path, name)
    found: dict[str, TensorInfo] = {}
    for file in files:
        if file.parent.resolve() != path.resolve() or not file.is_file():
            raise SourceError(
                f"{name} lacks the shard {file.name} that its index names",
                "download the model again: the copy is incomplete",
            )
        found |= read_header(file)
    if missing := weight_map.keys() - found.keys():
        raise SourceError(
            f"{name} lacks {len(missing)} tensors that its index names, {min(missing)} among them",
            "download the model again: a shard does not belong to this index",
        )
    return found


def _refuse_other_weights(path: Path, name: str) -> None:
    pickles = [f.name for f in path.iterdir() if f.suffix in PICKLES]
    if pickles:
        raise SourceError(
            f"{name} has only pickled weights ({pickles[0]}), which can run code when they are read",
            "convert them to safetensors where you trust them: load with transformers and `save_pretrained`",
        )
    raise SourceError(f"{name} has no *.safetensors file", "give a folder with a whole model, or a .gguf file itself")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, without reading them.  Raises SourceError if it is truncated."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise _truncated(file, "its header is incomplete")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
        except ValueError as error:
            raise _truncated(file, "its header is not JSON") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise _truncated(file, f"{8 + length + end:,} bytes are promised, {size:,} are there")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise SourceError(f"{file.name}: {name} has the type {entry['dtype']}, which torch cannot hold")
    return {
        name: TensorInfo(file, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _truncated(file: Path, why: str) -> SourceError:
    return SourceError(f"{file.name} is truncated or damaged: {why}", "download this file again")


def _other_files(path: Path) -> tuple[Path, ...]:
    """Everything in the folder that is not weights, config or a card: tokenizer, generation config, processor..."""
    ours = {"config.json", "README.md", "report.json", ".gitattributes"}
    return tuple(
        sorted(
            f
            for f in path.iterdir()
            if f.is_file() and f.name not in ours and not f.name.endswith(WEIGHTS) and f.suffix != ".py"
        )
    )


def first_not_finite(source: Source) -> str | None:
    """The first tensor with a NaN or an infinity, None if there is none.  Reads every weight once, in pieces."""
    for name, info in source.tensors.items():
        if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            continue
        for start in range(0, info.numel, PIECE):
            low, high = torch.aminmax(info.read(start, min(PIECE, info.numel - start)))
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return name
    return None

"""A model as it lies on disk: config, tokenizer, and weights known by their headers before any is read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import SourceError
from .bounds import MAX_CHARACTERS, check_config
from .headers import TensorInfo, read_header

WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack", ".onnx",
    ".gguf", ".ot", ".ckpt", ".tflite",
)  # fmt: skip
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # model.safetensors.index.fp32.json
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A dense model in a local folder.  `id` is what the user named; `files` are the others to carry over."""

    id: str
    revision: str | None
    path: Path
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)  # what its page on the Hub says of it
    changes: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json that `config` has otherwise

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

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in memory of its own, if it is one of floats in `dtype`."""
        found = self.tensors[name]
        return found.load(dtype if dtype is not None and found.dtype.is_floating_point else found.dtype)

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


def open_source(
    model: str | Path, revision: str | None = None, staging: Path | None = None, *, quantized: bool = False
) -> Source:
    """A model from a folder, a GGUF file or the Hub, checked from its headers alone.

    A GGUF file is unpacked into `staging` first, tensor by tensor.  Raises SourceError for a model that is
    missing, already quantized (unless `quantized` allows it), pickled only, dependent on remote code, incomplete or
    truncated.
    """
    path, found, facts = _locate(model, revision, staging, quantized)
    config = open_config(path, str(model), quantized)
    return Source(str(model), found, path, config, _tensors(path, str(model)), _other_files(path), facts)


def _locate(
    model: str | Path, revision: str | None, staging: Path | None, quantized: bool
) -> tuple[Path, str | None, Mapping[str, Any]]:
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from .gguf import stage

        if staging is None:
            raise SourceError(f"{path} must be unpacked first", "give a staging folder")
        return stage(path, staging), None, {}
    if path.is_dir():
        return path, None, {}
    if path.exists():
        raise SourceError(f"{path} is not a model folder", "give the folder that holds config.json, or a .gguf file")
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise SourceError(f"{path} does not exist", "give a model folder, a .gguf file or a Hub id like `org/name`")
    from .hub import download

    return download(str(model), revision, lambda folder: open_config(folder, str(model), quantized))


def open_config(path: Path, name: str, allow_quantized: bool = False) -> PretrainedConfig:
    """The config in a folder.  Raises SourceError for one that is none, or none of a model that can be read here."""
    file = path / "config.json"
    if not file.is_file():
        raise SourceError(f"{name} has no config.json", "give a folder in the layout of transformers' save_pretrained")
    try:
        raw: dict[str, Any] = json.loads(file.read_text()) if file.stat().st_size < MAX_CHARACTERS else {}
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file.name} of {name} is not JSON: {error}", "download the model again") from error
    check_config(raw or None, name)
    quantized = raw.get("quantization_config") or raw.get("compression_config")
    if quantized and not allow_quantized:
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
        weight_map = _weight_map(index)
        files = [path / file for file in sorted(set(weight_map.values()))]
    else:
        # some repositories hold the weights a second time, as their authors' own code reads them
        whole = path / "model.safetensors"
        weight_map, files = {}, [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) for file in found.values()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # as bad as one that is JSON and no map
    raise SourceError(f"{index.name} does not say which file holds which tensor", "download the model again")


def _refuse_other_weights(path: Path, name: str) -> None:
    pickles = [f.name for f in path.iterdir() if f.suffix in PICKLES]
    if pickles:
        raise SourceError(
            f"{name} has only pickled weights ({pickles[0]}), which can run code when they are read",
            "convert them to safetensors where you trust them: load with transformers and `save_pretrained`",
        )
    raise SourceError(f"{name} has no *.safetensors file", "give a folder with a whole model, or a .gguf file itself")


def _other_files(path: Path) -> tuple[Path, ...]:
    """Everything in the folder that is not weights, config or a card: tokenizer, generation config, processor...

    Folders within are looked into (chat templates lie in one) unless they hold a model of their own.
    """
    ours = {"config.json", "README.md", "report.json", ".gitattributes"}
    found = [f for f in path.iterdir() if f.is_file() and f.name not in ours and _is_carried(f)]
    for folder in path.iterdir():
        inside = [f for f in folder.rglob("*") if f.is_file()] if folder.is_dir() else []
        if not folder.name.startswith(".") and all(map(_is_carried, inside)) and folder / "config.json" not in inside:
            found += inside
    return tuple(sorted(found))


def _is_carried(file: Path) -> bool:
    return not (file.name.endswith(WEIGHTS) or file.suffix == ".py" or INDEX.search(file.name))

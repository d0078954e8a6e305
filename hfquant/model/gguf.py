"""A GGUF file as an ordinary model folder, unpacked with one tensor in memory at a time."""

import hashlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from ..errors import CheckpointError, ResourceError, SourceError
from ..tensors.shards import METADATA, Entry, write_checkpoint
from .gguf_tensors import Header, Parameters, parameters, read_header

STAMP = "gguf_sha256"  # in the safetensors header: which file a folder was made of


def stage(gguf_file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Unpack a GGUF file into `folder`: config, tokenizer, and safetensors in `dtype`.  Returns the folder.

    The tensors equal those of `from_pretrained(gguf_file=...)`.  A folder that holds the same file in the
    same type already is left as it is; one that holds another file is replaced; it appears once complete.
    Raises SourceError for a file that cannot be read, CheckpointError if the folder holds anything else,
    ResourceError if the disk is too small.
    """
    stamp = {STAMP: _sha256(gguf_file), "dtype": str(dtype).removeprefix("torch.")}
    if _is_staged(folder, stamp):
        return folder
    header = read_header(gguf_file)
    model = _empty_model(header, dtype)
    plan = list(_entries(header, model, dtype))
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    try:
        _check_disk(temporary, plan)
        _write_texts(header, model, temporary)
        write_checkpoint(temporary, plan, metadata=METADATA | stamp)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise SourceError(f"{file} does not exist", "give the path of a .gguf file")
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _is_staged(folder: Path, stamp: dict[str, str]) -> bool:
    """Whether the folder holds this file already.  Raises CheckpointError if what it holds is not ours."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    first = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    try:
        with safe_open(first or "", "pt") as f:
            found = f.metadata() or {}
    except (SafetensorError, OSError):
        found = {}
    if STAMP not in found:
        raise CheckpointError(f"{folder} is not empty, and not an unpacked GGUF file", "give another folder")
    return all(found.get(key) == value for key, value in stamp.items())


def _empty_model(header: Header, dtype: torch.dtype) -> PreTrainedModel:
    """The model of the file, on meta."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name)
    except (ValueError, KeyError) as error:
        known = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}))
        raise SourceError(
            f"transformers cannot unpack GGUF files of architecture `{header.architecture}`",
            f"use the model's own safetensors checkpoint; of GGUF it reads {known}",
        ) from error
    config.dtype = dtype
    auto = next(
        (a for a in (AutoModelForCausalLM, AutoModelForSeq2SeqLM) if type(config) in a._model_mapping),
        AutoModel,
    )
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config)
    return model


def _entries(header: Header, model: PreTrainedModel, dtype: torch.dtype) -> Iterator[Entry]:
    """What the folder will hold, in the model's order, under the names that `save_pretrained` would give.

    A parameter that checkpoints store in pieces (experts, one by one) is made once for all of them.
    """
    found = parameters(header, model, dtype)
    expected = {name: p for name, p in model.state_dict().items() if name not in _tied(model)}
    if lacking := [name for name, _ in model.named_parameters() if name in expected.keys() - found.names]:
        raise SourceError(
            f"{header.path.name} has no tensor for {len(lacking)} parameters, `{lacking[0]}` among them",
            "the file is incomplete, or newer than this transformers: convert or download it again",
        )
    cached = _Last(model, found)
    for name, meta in expected.items():
        if name not in found.names:
            continue  # a buffer that the model makes by itself
        pieces = revert_weight_conversion(model, {name: meta})
        for piece, tensor in pieces.items():
            yield Entry(piece, tuple(tensor.shape), dtype, partial(cached, name, piece))


class _Last:
    """The pieces of the parameter asked for last: asking for its next piece does not make it again."""

    def __init__(self, model: PreTrainedModel, found: Parameters) -> None:
        self.model, self.found = model, found
        self.shapes = {name: p.shape for name, p in model.state_dict().items()}
        self.name: str | None = None
        self.pieces: dict[str, Tensor] = {}

    def __call__(self, name: str, piece: str) -> Tensor:
        if name != self.name:
            self.pieces = {}  # before the next one is made
            tensor = self.found.load(name)
            if tensor.shape != self.shapes[name]:
                meant = list(self.shapes[name])
                raise SourceError(
                    f"the file stores `{name}` as {list(tensor.shape)}, its config means {meant}",
                    "transformers cannot read the sizes of this file; use the model's safetensors checkpoint",
                )
            self.pieces = revert_weight_conversion(self.model, {name: tensor})
            self.name = name
        return self.pieces.pop(piece)


def _tied(model: PreTrainedModel) -> set[str]:
    """The names that share the parameter of another name, which a checkpoint holds once."""
    first: dict[int, str] = {}
    model.tie_weights()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if first.setdefault(id(p), name) != name}


def _check_disk(folder: Path, plan: list[Entry]) -> None:
    needed, free = sum(entry.nbytes for entry in plan), shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"unpacking takes {needed / 1e9:.1f} GB, the disk of {folder.parent} has {free / 1e9:.1f} GB",
            "choose an output folder on a larger disk",
        )


def _write_texts(header: Header, model: PreTrainedModel, folder: Path) -> None:
    """Config, generation config and tokenizer; a file without a vocabulary gives a folder without one."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if "tokenizer.ggml.model" not in header.fields:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
    except (ValueError, KeyError) as error:
        raise SourceError(
            f"transformers cannot rebuild the tokenizer of {header.path.name}: {error}",
            "use the model's own safetensors checkpoint",
        ) from error
    tokenizer.save_pretrained(folder)

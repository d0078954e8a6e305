"""The same compressed model in another format: the same codes and scales, never rounded a second time.

What the target cannot say exactly is refused, with a way out.  `dense` gives up the codes: every weight is decoded and
rounded once to the model's own type, as stock transformers does when it loads compressed-tensors.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import report
from ..errors import CheckpointError, ExportError, FormatError
from ..measure import card
from ..model.headers import TensorInfo, read_header
from ..model.source import WEIGHTS
from ..plugin import load
from ..runtime.experts import QExperts
from ..runtime.nn import Packed, QLinear
from ..tensors import formats
from ..tensors.formats import Format, Wire
from ..tensors.layer import Quantized
from ..tensors.shards import INDEX, Entry, write_checkpoint, write_text

FORMATS = {"compressed-tensors": "compressed_tensors", "gptq": "gptq", "native": "native"}
OTHERS = ("gguf", "onnx")  # files of other programs
TARGETS = ("dense", *FORMATS, *OTHERS)
OF_A_FORMAT = (
    "tokens_per_second", "reference_tokens_per_second", "generation_memory_bytes", "reference_generation_memory_bytes",
)  # fmt: skip
DENSE = "use `--to dense`, which can say everything, or compress again with a recipe for that format"


def export(folder: str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Write the checkpoint in `folder` to `out` in the format `to`, one of TARGETS -> the report beside it.

    Raises CheckpointError if `out` is not empty or `folder` holds no compressed model, ExportError for what the
    format cannot say.
    """
    folder, out = Path(folder), Path(out)
    if to not in TARGETS:
        raise ExportError(f"there is no export to `{to}`", f"choose one of {', '.join(TARGETS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"`{out}` is not empty", "give a new folder")
    model = load(folder)
    wire = _wire(model, FORMATS[to]) if to in FORMATS else None
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _carry(folder, aside)
        told = _write_weights(folder, aside, model, to, wire)
        _write_config(folder, aside, wire)
        if to != "native" and getattr(model, "hfquant_kv_cache", None):
            told |= {"left_out": ["kv_cache"]}
        done = _write_report(folder, aside, told)
        if out.exists():
            out.rmdir()
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return done


def _write_weights(folder: Path, out: Path, model: Any, to: str, wire: Wire | None) -> dict[str, Any]:
    """The weights themselves; returns what the report says of how they are stored."""
    if to == "gguf":
        from .gguf import write

        _no_experts(model, to)
        types = write.write(folder, out / write.FILE, model, _stored(folder), _packed(model), report.read(folder))
        return {"format": "gguf", "types": types}
    if to == "onnx":
        from . import onnx

        _no_experts(model, to)
        onnx.write(folder, out)
        return {"format": "onnx"}
    write_checkpoint(out, list(_entries(folder, model, wire)))
    return {"format": "dense" if wire is None else wire.format}


def _no_experts(model: nn.Module, name: str) -> None:
    if any(isinstance(module, QExperts) for module in model.modules()):
        raise ExportError(f"fused experts cannot be exported to `{name}`", DENSE)


def _packed(model: nn.Module) -> dict[str, Packed]:
    """The packed layers by name, a shared one under each of its names."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Packed)}


def _wire(model: nn.Module, name: str) -> Wire:
    """How the target will store these layers.  Raises ExportError where it cannot store one of them exactly."""
    _no_experts(model, name)
    packed, fmt = _packed(model), formats.load(name)
    for layer, module in packed.items():
        if not module.encoding.plain:
            raise ExportError(f"`{name}` has no room for all that {layer} is made of", DENSE)
    try:
        formats.check(name, {n: (m.encoding, m.shape, _kind(m)) for n, m in packed.items()})
    except FormatError as error:
        raise ExportError(error.message, DENSE) from error
    scales = {n: m.quantized().scale for n, m in packed.items()}
    dtype = next(iter(scales.values())).dtype
    wire = Wire(
        format=name,
        layers={layer: module.encoding for layer, module in packed.items()},
        ignore=tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed),
        scale_dtype=torch.float16 if name == "gptq" else dtype,
        kv_cache=getattr(model, "hfquant_kv_cache", None) if name == "native" else None,
    )
    for layer, scale in scales.items():
        if not torch.equal(scale.to(wire.scale_dtype).float(), scale.float()):
            raise ExportError(
                f"`{name}` stores scales in {str(wire.scale_dtype).removeprefix('torch.')}, which cannot hold those"
                f" of {layer} exactly",
                f"compress again with `--set format={fmt.name}`, or use `--to dense`",
            )
    return wire


def _kind(module: Packed) -> str:
    if not isinstance(module, QLinear):
        return "embedding"
    return "conv1d" if module.transposed else "linear"


def _entries(folder: Path, model: nn.Module, wire: Wire | None) -> Iterator[Entry]:
    """The tensors of the new checkpoint: the old ones in their order, those of packed layers replaced."""
    stored, packed = _stored(folder), _packed(model)
    owners = {f"{name}.{part}": name for name, module in packed.items() for part in module.components}
    written: set[str] = set()
    for name, info in stored.items():
        if name not in owners:
            yield Entry(name, info.shape, info.dtype, partial(_read, info))
        elif owners[name] not in written:
            written.add(owners[name])
            yield from _layer(owners[name], packed[owners[name]], wire)
    shared = {id(packed[name].parts[0]) for name in written}
    if lost := [name for name, module in packed.items() if id(module.parts[0]) not in shared]:
        raise ExportError(f"{lost[0]} is stored under another name than it has in the model", DENSE)


def _stored(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by name, in its order."""
    found: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_header(file)
    return found


def _read(info: TensorInfo) -> Tensor:
    return info.read().view(info.shape)


def _layer(name: str, module: Packed, wire: Wire | None) -> Iterator[Entry]:
    if wire is None:
        turned = isinstance(module, QLinear) and module.transposed
        rows, columns = module.shape
        stored = (columns, rows) if turned else (rows, columns)
        yield Entry(f"{name}.weight", stored, module.dtype, partial(_dense, module, turned))
        return
    fmt = formats.load(wire.format)
    parts = _Parts(name, module, fmt, wire.scale_dtype)
    for component, (size, dtype) in fmt.spec(module.encoding, module.shape, wire.scale_dtype).items():
        yield Entry(f"{name}.{component}", size, dtype, parts.maker(component))


def _dense(module: Packed, turned: bool) -> Tensor:
    W = module.dequantize(module.dtype)
    return W.T.contiguous() if turned else W


class _Parts:
    """The components of one layer, packed when the first is asked for, and read back to see that nothing changed."""

    def __init__(self, name: str, module: Packed, fmt: Format, scale_dtype: torch.dtype) -> None:
        self.name, self.module, self.fmt, self.scale_dtype = name, module, fmt, scale_dtype
        self.parts: dict[str, Tensor] = {}

    def maker(self, component: str) -> Callable[[], Tensor]:
        return lambda: self.pop(component)

    def pop(self, component: str) -> Tensor:
        if not self.parts:
            Q = self.module.quantized()
            self.parts = self.fmt.pack(replace(Q, scale=Q.scale.to(self.scale_dtype)))
            if not _equal(self.fmt.unpack(self.parts, Q.encoding, Q.shape), Q):
                raise ExportError(f"{self.name} is not the same in `{self.fmt.name}`", "please report this as a bug")
        return self.parts.pop(component)


def _equal(a: Quantized, b: Quantized) -> bool:
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.zero_point, b.zero_point)
        and torch.equal(a.scale.float(), b.scale.float())
    )


def _carry(folder: Path, out: Path) -> None:
    """Tokenizer and all else that is neither weights nor ours to write.  Figures show the bytes of what they are of."""
    written = {"config.json", report.FILE, card.FILE, INDEX, "hfquant.json"}
    for file in folder.rglob("*"):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts) or inside.parts[0] == "figures"
        if file.is_file() and not hidden and file.suffix != ".safetensors" and file.name not in written:
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / inside)


def _write_config(folder: Path, out: Path, wire: Wire | None) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("quantization_config")
    if wire is not None:
        config["quantization_config"] = formats.load(wire.format).config(wire)
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_report(folder: Path, out: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The report, with what changed.  Scores stay: it is the same model.  Speed and memory are those of a format."""
    known: Mapping[str, Any] = report.read(folder)
    sections = {name: known[name] for name in report.SECTIONS if name in known and name != "figures"}
    if scores := sections.get("evaluation"):
        measured = (known.get("wire") or {}).get("format")
        kept = {name: value for name, value in scores.items() if name not in OF_A_FORMAT}
        sections["evaluation"] = {**kept, "measured_as": scores.get("measured_as") or measured}
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    size = sum((out / file).stat().st_size for file in files if file.endswith(WEIGHTS) and not file.endswith(".json"))
    stored = dict(told)
    if told["format"] in FORMATS.values():
        stored["config"] = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    if told["format"] == "dense":
        sections.pop("layers", None)
    exported = next((name for name, fmt in FORMATS.items() if fmt == told["format"]), told["format"])
    changed = {
        "wire": stored,
        "output": {**known.get("output", {}), "bytes": size, "files": files, "exported": exported},
    }
    done = report.merge(out, **{**sections, **changed})
    card.write(out, done)
    return done

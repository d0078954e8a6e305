"""PEFT's adapters on a compressed checkpoint, and `merge`: the one way in which they become part of it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from .. import report
from ..errors import CheckpointError, TrainingError
from ..machine import versions
from ..measure.evaluate import compare, logits
from ..measure.text import PACKAGED, cut, read_text
from ..model.inputs import longest
from ..plugin import load
from ..runtime.nn import Packed, QLinear
from .merge import Merged, outcome, requantize, settled

CONFIG = "adapter_config.json"
# what else an adapter may change, and how its config says that it does not
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}
KEPT = ("source", "recipe", "calibration", "wire", "layers")  # of the report: all else was of the model before


def merge(
    checkpoint: str | Path, adapter: str | Path, out: str | Path, *, text: str | Path | None = None, windows: int = 16
) -> dict[str, Any]:
    """Write a checkpoint into which a LoRA adapter is merged -> its report, whose `adapter` says what that cost.

    checkpoint, adapter: folders.  out: a new one.  text: what the models are compared on, by default the packaged one.
    Raises TrainingError for an adapter that is no plain LoRA of this model's linear layers, CheckpointError for folders
    that are not what they should be.
    """
    folder, extra, target = Path(checkpoint), Path(adapter), Path(out)
    _check(folder, extra, target)
    adapted = _adapted(folder, extra)
    base: PreTrainedModel = adapted.get_base_model()
    layers = _layers(adapted, base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = longest(base.config)
    ids = cut(read_text(PACKAGED if text is None else text), tokenizer, min(512, limit or 512), windows)
    before = [found.clone() for found in logits(base, ids)]
    rows = [_merge(name, layer) for name, layer in layers.items()]
    merged = adapted.unload()
    scores = compare(before, merged, ids)
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    merged.save_pretrained(unfinished)
    for file in folder.iterdir():  # tokenizer and what else lies beside the weights
        if file.is_file() and not (unfinished / file.name).exists() and not _of_the_weights(file):
            shutil.copyfile(file, unfinished / file.name)
    done = _report(folder, extra, unfinished, rows, scores.to_dict())
    if target.exists():
        target.rmdir()  # it is empty
    unfinished.rename(target)
    return done


def _check(folder: Path, adapter: Path, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"`{out}` is not empty", "give a new folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"`{folder}` is no compressed model", "give the folder that `hfquant compress` wrote")
    if not (adapter / CONFIG).is_file():
        raise TrainingError(f"`{adapter}` has no {CONFIG}", "give the folder that PEFT's `save_pretrained` wrote")
    try:
        config = json.loads((adapter / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise TrainingError(f"{CONFIG} of `{adapter}` is not JSON: {error}", "save the adapter again") from error
    if config.get("peft_type") != "LORA":
        raise TrainingError(f"the adapter is {config.get('peft_type')}, not LoRA", "only LoRA can be merged")
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise TrainingError(
                f"the adapter says `{key}: {config[key]}`, which a packed layer cannot take",
                "use it unmerged, or `hfquant export --to dense` and merge with PEFT",
            )


def _adapted(folder: Path, adapter: Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise TrainingError("merging an adapter needs PEFT", "`pip install hfquant[peft]`") from error
    hint = "give the model it was trained on"
    try:
        adapted = peft.PeftModel.from_pretrained(load(folder), str(adapter)).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"the adapter does not fit the model: {str(error).splitlines()[0]}", hint) from error
    # PEFT only warns of what is missing, and says nothing of what is there besides
    if different := set(peft.get_peft_model_state_dict(adapted)) ^ _stored(adapter):
        raise TrainingError(f"the adapter does not fit the model: `{min(different)}` is not in both", hint)
    return adapted


def _stored(adapter: Path) -> set[str]:
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise TrainingError(f"`{adapter}` has no {file.name}", "save the adapter as safetensors")
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


def _layers(adapted: nn.Module, base: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by their names in the model."""
    from peft.tuners.lora import LoraLayer

    found = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    if not found:
        raise TrainingError("the adapter changes no layer of this model", "give the model it was trained on")
    owners: dict[int, int] = {}
    for module in base.modules():
        if isinstance(module, Packed):
            owners[id(module.parts[0])] = owners.get(id(module.parts[0]), 0) + 1
    for name, layer in found.items():
        inner: Any = layer.get_base_layer()
        if not isinstance(inner, nn.Linear):
            raise TrainingError(f"`{name}` ({type(inner).__name__}) is no linear layer", "adapt linear layers only")
        if isinstance(inner, QLinear) and owners[id(inner.parts[0])] > 1:
            raise TrainingError(
                f"`{name}` shares its weight with the embedding, which the adapter does not change",
                "leave it out of the adapter's `target_modules`",
            )
    return found


@torch.no_grad()
def _merge(name: str, layer: Any) -> Merged:
    """Put the adapter of one layer into its weight."""
    inner, (active,) = layer.get_base_layer(), layer.active_adapters
    delta = layer.get_delta_weight(active).float()
    if not isinstance(inner, QLinear):
        before = inner.weight.detach().float().clone()
        inner.weight.data = (before + delta).to(inner.weight.dtype)
        return outcome(name, before, delta, inner.weight.detach().float())
    Q = inner.quantized()
    merged = requantize(Q, delta)
    inner.fill(merged)
    return outcome(name, Q.dequantize(), delta, inner.quantized().dequantize())


def _of_the_weights(file: Path) -> bool:
    return file.name in (report.FILE, "README.md") or ".safetensors" in file.name


def _report(folder: Path, adapter: Path, out: Path, rows: list[Merged], scores: dict[str, Any]) -> dict[str, Any]:
    known = report.read(folder)
    kept = {key: known[key] for key in KEPT if key in known}
    if "layers" in kept:  # their errors were those before
        changed = {row.name for row in rows}
        kept["layers"] = [
            row | {"error": None, "trail": []} if str(row["name"]).rpartition(".")[0] in changed else row
            for row in kept["layers"]
        ]
    files = sorted(file.name for file in out.iterdir() if file.is_file())
    return report.merge(
        out,
        **kept,
        adapter={
            "id": adapter.name,
            "layers": [asdict(row) for row in rows],
            "mean": settled(rows),
            "against_unmerged": {key: scores[key] for key in ("kl", "top1_agreement", "perplexity", "tokens")}
            | {"unmerged_perplexity": scores["reference_perplexity"]},
            "versions": versions(),
        },
        output={
            "bytes": sum((out / f).stat().st_size for f in files if f.endswith(".safetensors")),
            "files": files,
        },
    )

"""README.md: the model card, rendered from the report and nothing else."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import ChainableUndefined, Environment, PackageLoader

from ..tensors.shards import write_text
from .markdown import Safe, code, fence, finalize, number, size
from .report import SECTIONS
from .trail import step_errors

FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
TAG = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,62}")
STANDARD = {"compressed_tensors": "compressed-tensors", "gptq": "gptq"}


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """Render the card of a checkpoint into its folder, in one step."""
    write_text(folder / FILE, render(report))
    return folder / FILE


def render(report: Mapping[str, Any]) -> str:
    """The card of a report (see `measure.report`); sections that the report lacks are left out."""
    environment = Environment(
        loader=PackageLoader("hfquant.measure", "."),
        finalize=finalize,
        undefined=ChainableUndefined,  # what a report does not say is a dash
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: `finalize` makes code spans of all text that is not ours
    )
    environment.filters |= {"code": code, "fence": fence, "number": number, "size": size, "yaml": _yaml}
    sections = {name: report.get(name) or {} for name in SECTIONS if name != "layers"}
    layers = [_row(layer) for layer in report.get("layers") or []]
    return environment.get_template("card.md.jinja").render(
        **sections,
        layers=layers,
        steps=step_errors(report),
        metadata=Safe(metadata(report).to_yaml()),
        name=display_name(report),
        link=_link(report),
        version=report.get("hfquant", "?"),
        format=(report.get("wire") or {}).get("format"),
        noted=[layer for layer in layers if layer["notes"]],
    )


def metadata(report: Mapping[str, Any]) -> ModelCardData:
    """The card's YAML block.  Only what has the shape of an id, a licence or a tag gets into it."""
    wire, output = report.get("wire") or {}, report.get("output") or {}
    standard = STANDARD.get(str(wire.get("format")))
    base, licence = _hub_id(report), (report.get("source") or {}).get("license")
    tags = ["hfquant", standard, str((report.get("recipe") or {}).get("name"))]
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers" if standard else "hfquant",
        license=licence if isinstance(licence, str) and LICENCE.fullmatch(licence) else None,
        pipeline_tag=_pipeline(output),
        tags=[tag for tag in tags if tag and TAG.fullmatch(tag)],
    )


def display_name(report: Mapping[str, Any]) -> str:
    """The original's Hub id, or the last part of its path: where it lay on a disk is nobody's business."""
    named = str((report.get("source") or {}).get("id") or "a model")
    return _hub_id(report) or re.split(r"[/\\]", named.rstrip("/\\"))[-1] or "a model"


def _hub_id(report: Mapping[str, Any]) -> str | None:
    """The original's Hub id; None if it was a local folder, which has no revision."""
    source = report.get("source") or {}
    found = str(source.get("id"))
    return found if source.get("revision") and HUB_ID.fullmatch(found) else None


def _link(report: Mapping[str, Any]) -> Safe | None:
    found = _hub_id(report)
    return Safe(f"[{code(found)}](https://huggingface.co/{found})") if found else None


def _pipeline(output: Mapping[str, Any]) -> str | None:
    """The Hub's task; None where the report does not tell it."""
    if output.get("model_type") == "whisper":
        return "automatic-speech-recognition"
    architecture = str(output.get("architecture"))
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel")) and not output.get("encoder_decoder")
    return "text-generation" if causal else None


def _row(layer: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of layers."""
    grid = layer.get("grid")
    if isinstance(grid, Mapping):
        group = "per row" if grid["group_size"] == -1 else f"groups of {grid['group_size']}"
        grid = f"{grid['bits']} bit, {group}, {'symmetric' if grid['symmetric'] else 'asymmetric'}"
    shape = " × ".join(str(n) for n in layer.get("shape") or []) or None
    return {**layer, "grid": grid, "shape": shape, "notes": "; ".join(layer.get("notes") or [])}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)

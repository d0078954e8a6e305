"""README.md: the model card, rendered from the report and nothing else."""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from .. import methods
from ..report import SECTIONS, public
from ..tensors.shards import write_text
from .markdown import Safe, code, fence, finalize, number, size, visible
from .trail import step_errors

PACKAGED = Path(__file__).parent.parent / "model_cards"  # in a checkout they are at its top
TEMPLATES = PACKAGED if PACKAGED.is_dir() else PACKAGED.parent.parent / "model_cards"
FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
TAG = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,62}")
NAME = re.compile(r"[\w][\w .,()+-]{0,95}", re.ASCII)
LINK = re.compile(r"https://[\w./~%+-]{1,200}|LICENSE[\w.-]{0,40}", re.ASCII)
PICTURE = re.compile(r"figures/[a-z][a-z0-9-]{0,40}\.png", re.ASCII)
NO_WORDS = re.compile(r"[^\w .,;:()%+/=-]")
PAPER = re.compile(r"(.+?) \((.+?, \d{4}); arXiv:(\d{4}\.\d{4,5})[,)]")
METRICS = {
    "perplexity": "Perplexity",
    "kl": "KL divergence from the original, nats per token",
    "top1_agreement": "Same most likely token as the original",
}
LIBRARIES = {"dense": "transformers", "gguf": "gguf", "onnx": "onnx"}
GROUPS = (32, 64, 128)  # that vLLM has kernels for
STANDARD = {"compressed_tensors": "compressed-tensors", "gptq": "gptq"}


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """Render the card of a checkpoint into its folder, in one step."""
    write_text(folder / FILE, render(report))
    return folder / FILE


def render(report: Mapping[str, Any]) -> str:
    """The card of a report (see `hfquant.report`); sections that the report lacks are left out."""
    report = public(report)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
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
        papers=[Safe(paper) for paper in _papers(report)],
        pictures={about: [Safe(p) for p in _pictures(report, about)] for about in ("result", "model")},
        tasks=list(_tasks(report)),
        share=_share(report),
        vllm=_is_for_vllm(report),
    )


def metadata(report: Mapping[str, Any]) -> ModelCardData:
    """The card's YAML block.  Only what has the shape of an id, a licence or a tag gets into it."""
    wire, output, recipe = (report.get(name) or {} for name in ("wire", "output", "recipe"))
    form = str(wire.get("format"))
    standard = STANDARD.get(form)
    base = _hub_id(report)
    tags = ["hfquant", standard, str(recipe.get("name")), *_steps(report)]
    results = list(_results(report))
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers" if standard else LIBRARIES.get(form, "hfquant"),
        pipeline_tag=_pipeline(output),
        tags=list(dict.fromkeys(tag for tag in tags if tag and TAG.fullmatch(tag))),
        model_name=plain_name(report) if results else None,
        eval_results=results or None,
        **_licence(report),
    )


def _licence(report: Mapping[str, Any]) -> dict[str, Any]:
    """The original's licence, if it looks like one.  The Hub wants a name for what is not on its list."""
    source = report.get("source") or {}
    found, name, link = (str(source.get(key)) for key in ("license", "license_name", "license_link"))
    if not LICENCE.fullmatch(found):
        return {"license": None}
    if found != "other":
        return {"license": found}
    link = link if LINK.fullmatch(link) and ".." not in link else ""
    return {"license": found, "license_name": name if NAME.fullmatch(name) else "unknown", "license_link": link or None}


def _results(report: Mapping[str, Any]) -> Iterator[EvalResult]:
    """What was measured, as the Hub's index of models has it."""
    evaluation = report.get("evaluation") or {}
    text = _plain((evaluation.get("settings") or {}).get("text"), "a text")
    task = _pipeline(report.get("output") or {}) or "text-generation"
    for metric, label in METRICS.items():
        value = evaluation.get(metric)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield EvalResult(task, "text", text, metric, value, metric_name=label)
    for row in _tasks(report):
        name = _plain(row["name"], "a task")
        asked = f"{name}, {row['n']} questions" if isinstance(row.get("n"), int) else name
        if isinstance(row.get("value"), int | float):
            # the name as the type too: results of one type are taken for those of one dataset
            yield EvalResult(task, name, asked, _plain(row["metric"], "score"), row["value"])


def _plain(text: object, otherwise: str) -> str:
    """A name that is nothing but a name."""
    return text if isinstance(text, str) and (NAME.fullmatch(text) or HUB_ID.fullmatch(text)) else otherwise


def _steps(report: Mapping[str, Any]) -> list[str]:
    """The methods of the recipe that hfquant knows, in order."""
    steps = (report.get("recipe") or {}).get("steps") or ()
    named = (step.get("method") for step in steps if isinstance(step, Mapping))
    return [name for name in named if name in methods.NAMES]


def _papers(report: Mapping[str, Any]) -> Iterator[str]:
    """The papers of the methods that were used, from the first line of each."""
    for name in _steps(report):
        if found := PAPER.match(import_module(f"{methods.__name__}.{name}").__doc__ or ""):
            yield f"{found[1]}: {found[2]}, [arXiv:{found[3]}](https://arxiv.org/abs/{found[3]})"


def _pictures(report: Mapping[str, Any], about: str) -> Iterator[str]:
    """The figures of a diagnosis, as Markdown: only files where figures lie, only words as their text."""
    chosen = (report.get("budget") or {}).get("figure")
    for figure in [*([chosen] if chosen else []), *((report.get("figures") or {}).get("files") or ())]:
        if figure.get("about") == about and PICTURE.fullmatch(str(figure.get("file"))):
            text = " ".join(NO_WORDS.sub(" ", visible(str(figure.get("alt")))).split())[:1000]
            yield f"![{text}]({figure['file']})"


def _tasks(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for every score of every task."""
    tasks = (report.get("evaluation") or {}).get("tasks")
    for name, task in tasks.items() if isinstance(tasks, Mapping) else ():
        for metric, score in task["scores"].items():
            yield {"name": name, "metric": metric, "n": task.get("n"), "source": task.get("source"), **score}


def plain_name(report: Mapping[str, Any]) -> str:
    """`display_name`, if that is nothing but a name: for headers and titles that cannot show foreign text."""
    return _plain(display_name(report), "a model")


def display_name(report: Mapping[str, Any]) -> str:
    """The original's Hub id, or the last part of its path: where it lay on a disk is nobody's business."""
    named = str((report.get("source") or {}).get("id") or "a model")
    return _hub_id(report) or re.split(r"[/\\]", named.rstrip("/\\"))[-1] or "a model"


def _share(report: Mapping[str, Any]) -> float | None:
    """The size of the compressed weights over that of the original's."""
    after, before = ((report.get(name) or {}).get("bytes") for name in ("output", "source"))
    return after / before if isinstance(after, int) and isinstance(before, int) and before else None


def _is_for_vllm(report: Mapping[str, Any]) -> bool:
    """Whether vLLM has kernels for what is stored: 4 or 8 bit, symmetric, one grid, groups that divide the rows.

    Of rounded inputs it has those of 8 bit, where weights have a scale per row.
    """
    layers, output = report.get("layers") or (), report.get("output") or {}
    if (report.get("wire") or {}).get("format") not in STANDARD or output.get("encoder_decoder") or not layers:
        return False
    grid = layers[0].get("grid")
    plain = all(layer.get("kind") == "linear" and layer.get("grid") == grid for layer in layers)
    if not plain or not isinstance(grid, Mapping) or grid.get("bits") not in (4, 8) or not grid.get("symmetric"):
        return False
    inputs, group = (report.get("recipe") or {}).get("activations"), grid.get("group_size")
    if inputs:
        return isinstance(inputs, Mapping) and (inputs.get("bits"), grid["bits"], group) == (8, 8, -1)
    return group == -1 or (group in GROUPS and all(layer["shape"][1] % group == 0 for layer in layers))


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
    steps = [str(step[0]) for step in layer.get("trail") or ()]
    method = " + ".join(steps) or layer.get("method")
    return {**layer, "grid": grid, "shape": shape, "method": method, "notes": "; ".join(layer.get("notes") or [])}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)

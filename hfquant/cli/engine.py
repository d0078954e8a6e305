"""The calls from the command line into the library.  Here, and in the other `engine_*`, heavy imports happen."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..compress import LayerResult, Plan
    from ..compress.crew import Crew
    from ..conversion.hub import Pushed
    from ..measure.bench import Bench
    from ..measure.layers import LayerFacts
    from ..measure.tasks import Tasks
    from ..measure.trail import StepError
    from ..model.source import Source
    from ..recipe import Recipe
    from ..train import Training


def read_recipe(recipe: str, changes: list[str] | None) -> "Recipe":
    from ..recipe import Recipe

    return Recipe.parse(recipe, changes or [])


def plan(model: "str | Source", recipe: "Recipe", out: Path, **settings: Any) -> "Plan":
    """Everything checked and estimated, nothing done."""
    quiet()
    from ..compress import plan

    return plan(model, recipe, out, **settings)


def check_text(source: "Source", text: Path | None) -> None:
    """Raises CalibrationError for a text that the result could not be measured on."""
    from ..measure.verify import check_text

    check_text(source, text)


def crew(name: str | None, **settings: Any) -> "Crew":
    """Who does it."""
    quiet()
    from ..compress.crews import crew_of

    return crew_of(name, **settings)


def layers(plan: "Plan") -> "Iterator[LayerResult]":
    """Do what was planned, layer by layer; afterwards `plan.out` is a complete checkpoint."""
    from ..compress import compress

    return compress(plan)


def plan_training(model: str, recipe: "Recipe", text: str, out: Path, **settings: Any) -> "Training":
    """Everything checked, nothing done."""
    quiet()
    from ..train import plan

    return plan(model, recipe, text, out, **settings)


def train(plan: "Training", told: "Callable[[Mapping[str, float]], None]") -> dict[str, Any] | None:
    """Do what was planned; the report, if this is the process that writes it."""
    from ..train import train

    return train(plan, told)


def merge(folder: Path, adapter: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Put an adapter into a compressed model; the new one's report."""
    quiet()
    from ..train.adapter import merge

    return merge(folder, adapter, out, **settings)


def verify(folder: Path, **settings: Any) -> dict[str, Any]:
    """Reload and measure; the updated report."""
    quiet()
    from ..measure.verify import verify

    return verify(folder, enforce=False, **settings)


def tasks(names: str, folder: Path | None, limit: int | None, whole: bool) -> "Tasks":
    """Tasks by name, checked."""
    quiet()
    from ..measure.tasks import find

    return find([name.strip() for name in names.split(",") if name.strip()], folder, limit, whole)


def bench(folder: Path, **settings: Any) -> "Bench":
    """Run it beside its original."""
    quiet()
    from ..measure.bench import bench

    return bench(folder, **settings)


def judge(report: dict[str, Any]) -> None:
    """Raises QualityError if the report does not reach the limits that it names."""
    from ..measure.gate import Gate, gate

    gate(report, Gate(**report["gate"]["limits"]))


def read_config(folder: Path) -> Mapping[str, Any]:
    """A checkpoint's `quantization_config`.  Raises CheckpointError for a folder that is not one."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"`{folder}` is not a compressed model: it has no config.json",
            "give the folder that `hfquant compress --out` wrote",
        )
    config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if not config:
        raise CheckpointError(
            f"`{folder}` holds a model that is not compressed", f"`hfquant compress {folder} ...` does it"
        )
    found: Mapping[str, Any] = config
    return found


def inspect(folder: Path) -> "Iterator[LayerFacts]":
    """The layers of a compressed model, read back from disk."""
    quiet()
    from .. import report
    from ..measure.layers import layers

    return layers(folder, report.read(folder))


def steps(folder: Path) -> "list[StepError]":
    """The layers' mean error after every step of the recipe, where it had several."""
    from .. import report
    from ..measure.trail import step_errors

    return step_errors(report.read(folder))


def diagnose(model: str, out: Path | None, **settings: Any) -> dict[str, Any]:
    """Measure a model and draw figures; the data behind them."""
    quiet()
    from ..measure.diagnose import diagnose

    return diagnose(model, out, **settings)


def check_push(repo: str, **settings: Any) -> None:
    """Raises HubError if a push to this repository could not succeed."""
    from ..conversion.access import check_access

    check_access(repo, **settings)


def push(folder: Path, repo: str, **settings: Any) -> "Pushed":
    """Publish a compressed model on the Hub."""
    read_config(folder)
    from ..conversion.hub import push

    return push(folder, repo, **settings)


def export(folder: Path, to: str, out: Path) -> dict[str, Any]:
    """Write a compressed model in another format; its report."""
    quiet()
    from ..conversion.export import export

    return export(folder, to, out)


def stream(folder: Path, prompt: str, max_new_tokens: int) -> None:
    """Generate greedily and print each token to stdout as it comes."""
    quiet()
    import torch
    from transformers import AutoTokenizer, TextStreamer

    from ..plugin import load

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{folder}` has no tokenizer: {str(error).splitlines()[0]}",
            "copy the original model's tokenizer files there",
        ) from error
    model = load(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


def quiet() -> None:
    """transformers draws bars and logs advice of its own; the commands here say what matters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

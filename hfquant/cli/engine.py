"""Every call from the command line into the library: the one place where heavy imports happen."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RecipeError, RequestError

if TYPE_CHECKING:
    from ..compress import LayerResult, Plan
    from ..conversion.hub import Pushed
    from ..conversion.service import Service
    from ..conversion.settings import Settings
    from ..conversion.worker import Worker
    from ..measure.bench import Bench
    from ..measure.layers import LayerFacts
    from ..measure.tasks import Tasks
    from ..measure.trail import StepError
    from ..recipe import Recipe
    from ..runtime.offload.hardware import Hardware
    from ..runtime.offload.jsonl import Answers
    from ..runtime.offload.planning import OffloadPlan


def read_recipe(recipe: str, changes: list[str] | None) -> "Recipe":
    from ..recipe import Recipe

    return Recipe.parse(recipe, changes or [])


def plan(model: str, recipe: "Recipe", out: Path, **settings: Any) -> "Plan":
    """Everything checked and estimated, nothing done."""
    _quiet()
    from ..compress import plan

    return plan(model, recipe, out, **settings)


def layers(plan: "Plan") -> "Iterator[LayerResult]":
    """Do what was planned, layer by layer; afterwards `plan.out` is a complete checkpoint."""
    from ..compress import compress

    return compress(plan)


def verify(folder: Path, **settings: Any) -> dict[str, Any]:
    """Reload and measure; the updated report."""
    _quiet()
    from ..measure.verify import verify

    return verify(folder, enforce=False, **settings)


def tasks(names: str, folder: Path | None, limit: int | None) -> "Tasks":
    """Tasks by name, checked."""
    _quiet()
    from ..measure.tasks import find

    return find([name.strip() for name in names.split(",") if name.strip()], folder, limit)


def bench(folder: Path, **settings: Any) -> "Bench":
    """Run it beside its original."""
    _quiet()
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
    _quiet()
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
    _quiet()
    from ..measure.diagnose import diagnose

    return diagnose(model, out, **settings)


def check_push(repo: str, **settings: Any) -> None:
    """Raises HubError if a push to this repository could not succeed."""
    from ..conversion.hub import check_access

    check_access(repo, **settings)


def push(folder: Path, repo: str, **settings: Any) -> "Pushed":
    """Publish a compressed model on the Hub."""
    read_config(folder)
    from ..conversion.hub import push

    return push(folder, repo, **settings)


def export(folder: Path, to: str, out: Path) -> dict[str, Any]:
    """Write a compressed model in another format; its report."""
    _quiet()
    from ..conversion.export import export

    return export(folder, to, out)


def stream(folder: Path, prompt: str, max_new_tokens: int) -> None:
    """Generate greedily and print each token to stdout as it comes."""
    _quiet()
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


def offload_plan(model: str, prompt: int, new: int, prompts: int, **settings: Any) -> "OffloadPlan":
    """Open the model, measure a block of it, and solve for a policy."""
    _quiet()
    from ..runtime.offload.cost import Workload
    from ..runtime.offload.model import OffloadedModel
    from ..runtime.offload.planning import Budget, plan_offload
    from ..runtime.offload.policy import Policy

    disk, like = settings["disk"], Policy(cache_bits=settings["cache_bits"], attention=settings["attention"])
    with OffloadedModel(model, disk=disk, dtype=_dtype(settings["dtype"])) as offloaded:
        budget = Budget(settings["host_memory"], None, disk)
        work = Workload(prompts, prompt, new)
        return plan_offload(offloaded, work, budget, like=like, latency=settings["latency"])


def _dtype(name: str | None) -> Any:
    """float32 -> torch.float32; None stays."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise RecipeError(f"weights cannot be computed with in {name}", f"choose one of {', '.join(known)}")
    return None if name is None else known[name]


def hardware(disk: Path | None, fresh: bool) -> "Hardware":
    import tempfile

    from ..runtime.offload.hardware import profile

    return profile(disk or Path(tempfile.gettempdir()), fresh)


def offload_texts(model: str, prompts: list[str], **settings: Any) -> list[str]:
    """Texts that follow some prompts, by offloaded generation."""
    _quiet()
    from ..runtime.offload.door import offload_generate

    given, how = _offload_settings(settings)
    return [str(text) for text in offload_generate(model, prompts, **given, **how)]


def answers(model: str, source: Path, out: Path, settings: Mapping[str, Any]) -> "Answers":
    """The answers that are there already, and where new ones go."""
    from ..runtime.offload.jsonl import Answers, read_prompts

    decisive = ("max_new_tokens", "cache_bits", "attention", "dtype", "temperature", "seed")
    return Answers(out, read_prompts(source), {"model": model} | {key: settings[key] for key in decisive})


def answer(model: str, answers: "Answers", meter: Any, **settings: Any) -> None:
    """Generate what is missing; each answer is written as soon as it is there."""
    _quiet()
    from ..runtime.offload.door import decode, opened

    given, how = _offload_settings(settings)
    seed = how.pop("seed", None)
    if missing := answers.missing:
        texts = [answers.prompts[i]["prompt"] for i in missing]
        with opened(model, texts, **given) as (offloaded, ids):
            tokenizer = offloaded.skeleton.source.tokenizer()
            offloaded.on_tokens = meter(len(ids) * given["max_new_tokens"])
            for i, tokens in offloaded.stream(ids, seed, max_new_tokens=given["max_new_tokens"], **how):
                answers.add(missing[i], decode(tokenizer, tokens), len(tokens))
    answers.finish()


def _offload_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command line says of the policy, and of the tokens."""
    from ..runtime.offload.policy import Policy

    asked = ("max_new_tokens", "host_memory", "disk", "cache_bits", "attention", "latency")
    given = {key: settings[key] for key in asked} | {"dtype": _dtype(settings["dtype"])}
    batch, batches = settings["batch"], settings["batches"]
    if batch is not None or batches is not None:
        like = {"cache_bits": given["cache_bits"], "attention": given["attention"]}
        given["policy"] = Policy(batch=batch or 1, batches=batches or 1, **like)
    if settings["temperature"] is None:
        return given, {"do_sample": False}
    return given, {"do_sample": True, "temperature": settings["temperature"], "seed": settings["seed"]}


def service() -> "Service":
    """The conversion service of this machine, or the one that HFQUANT_DATABASE names."""
    settings = _service_settings()
    from ..conversion.service import Service

    return Service(settings)


def worker(at_once: int, windows: int | None, limits: Mapping[str, Any]) -> "Worker":
    """A worker of that service."""
    settings = _service_settings()
    _quiet()
    from ..conversion.redact import log_to_stderr
    from ..conversion.settings import Measuring
    from ..conversion.worker import Worker

    log_to_stderr()
    given = {name: value for name, value in limits.items() if value is not None}
    measuring = settings.measuring if windows is None else Measuring(windows=windows)
    changed = replace(settings, limits=replace(settings.limits, **given), measuring=measuring)
    return Worker(changed, at_once=at_once)


def new_secret() -> str:
    _service_settings()
    from ..conversion.vault import new_secret

    return new_secret()


def _service_settings() -> "Settings":
    """From the environment.  Without a secret it is one's own machine, whose login is used.

    Raises RequestError where the packages for it are not installed.
    """
    missing = [name for name in ("dbos", "sqlalchemy", "cryptography") if find_spec(name) is None]
    if missing:
        raise RequestError(f"the service needs the package `{missing[0]}`", "`pip install 'hfquant[service]'`")
    from ..conversion.settings import Settings

    settings = Settings.read()
    return replace(settings, own_login=settings.secret is None)


def _quiet() -> None:
    """transformers draws bars and logs advice of its own; the commands here say what matters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
